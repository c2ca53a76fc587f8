"""What a way to merge is, and the values of its parameters for one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from lcx.merging.parameters import Parameter
from lcx.merging.tensors import Block, Tensor

Merge = Callable[[Block], np.ndarray]
"""From a block of the inputs to the merged numbers `[rows, C]`; it may overwrite the block."""


@dataclasses.dataclass(frozen=True)
class Values:
    """The parameters of a method for one tensor: those of the tensor, and those of each model in their order."""

    tensor: Mapping[str, Any]
    models: tuple[Mapping[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return self.tensor[name]

    def each(self, name: str) -> np.ndarray:
        """One parameter of all models, float64."""
        return np.array([model[name] for model in self.models], np.float64)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    `base`: whether models are taken relative to a base model, which then is not one of them. `least` and `most` are numbers of
    models beside that base. `prepare` may go over the tensor's blocks as often as it needs.
    """

    prepare: Callable[[Tensor, Values], Merge]
    parameters: Mapping[str, Parameter]
    base: Literal["needed", "optional", "none"] = "needed"
    least: int = 1
    most: int | None = None

    def apply(self, tensor: Tensor, values: Values, write: Callable[[int, np.ndarray], None]) -> None:
        """Merge a tensor; `write` gets the first row and the numbers of each block, from several threads and in any order."""
        if tensor.size:
            merge = self.prepare(tensor, values)
            for _ in tensor.over(lambda block: write(block.start, merge(block))):
                pass

    @property
    def of_models(self) -> list[str]:
        """Names of the parameters that each model has of its own."""
        return [name for name, parameter in self.parameters.items() if parameter.each]


WEIGHT = Parameter(None, each=True)
DENSITY = Parameter(1.0, each=True, least=0.0, most=1.0, above=True)
LAMBDA = Parameter(1.0)


def normalize(default: bool) -> Parameter:
    """Whether weights are divided by their sum."""
    return Parameter(default, bool)
