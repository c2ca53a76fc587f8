"""Values of a merge's parameters, as mergekit's YAML has them: one for all, a gradient over the layers, or by tensor names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core.configs import nearest
from lcx.core.errors import UserError

Scalar = float | int | bool | str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a method's parameter may be. `default` None: it has to be given. `each`: a model has its own.

    Numbers are from `least` to `most`, both included unless `above` says that they are above `least`.
    """

    default: Scalar | None
    kind: type = float
    each: bool = False
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()

    def check(self, path: str, value: Any) -> Scalar:
        """`value`, if it is allowed; numbers that YAML takes for text, such as 1e-5, become numbers."""
        if self.kind in (float, int) and isinstance(value, str):
            value = _number(value)
        if self.kind is str:
            if value not in self.choices:
                raise UserError(f"{path}={value!r} is unknown{nearest(str(value), self.choices)}")
            return value
        if self.kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{path}={value!r}: expected true or false")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{path}={value!r}: expected a number, a list of numbers, or a list of filter and value")
        if self.kind is int and value != int(value):
            raise UserError(f"{path}={value!r}: expected a whole number")
        if not self.least <= value <= self.most or self.above and value == self.least:
            raise UserError(f"{path}={value!r} must be {self._range()}")
        return self.kind(value)

    def _range(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.least:g}" if self.least > -math.inf else ""
        high = f"at most {self.most:g}" if self.most < math.inf else ""
        return " and ".join(part for part in (low, high) if part)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a file says of one parameter: pairs of a part of a tensor's name (None: any) and a gradient of one or more values."""

    entries: tuple[tuple[str | None, tuple[Scalar, ...]], ...]

    def at(self, name: str, place: float) -> Scalar | None:
        """The value for a tensor at `place` between the first layer (0) and the last (1); None where no filter matches.

        The values of a gradient are evenly spaced over the layers, and interpolated linearly between.
        """
        for part, values in self.entries:
            if part is None or part in name:
                if len(values) == 1:
                    return values[0]
                return float(np.interp(place * (len(values) - 1), range(len(values)), [float(value) for value in values]))
        return None


def parse(path: str, value: Any, parameter: Parameter) -> Setting:
    """A setting from YAML's value; raises `UserError` that starts with `path` for what `parameter` does not allow."""
    if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(item, Mapping) for item in value):
        entries = [_conditional(f"{path}[{i}]", item, parameter) for i, item in enumerate(value)]
        return Setting(tuple(entries))
    return Setting(((None, _values(path, value, parameter)),))


def _conditional(path: str, item: Any, parameter: Parameter) -> tuple[str | None, tuple[Scalar, ...]]:
    if not isinstance(item, Mapping):
        raise UserError(f"{path}={item!r}: expected filter and value, as the other entries of the list")
    for key in item:
        if key not in ("filter", "value"):
            raise UserError(f"{path} has no field {key!r}{nearest(str(key), ('filter', 'value'))}")
    if "value" not in item:
        raise UserError(f"{path} has no value; add one")
    part = item.get("filter")
    if part is not None and not isinstance(part, str):
        raise UserError(f"{path}.filter={part!r}: expected a part of a tensor's name, such as self_attn")
    return (None if part == "*" else part), _values(f"{path}.value", item["value"], parameter)


def _values(path: str, value: Any, parameter: Parameter) -> tuple[Scalar, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if parameter.kind is not float:
            raise UserError(f"{path}={value!r}: {parameter.kind.__name__} has no gradient; give one value")
        if not value:
            raise UserError(f"{path} is an empty list; give at least one number")
        return tuple(parameter.check(f"{path}[{i}]", item) for i, item in enumerate(value))
    return (parameter.check(path, value),)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
