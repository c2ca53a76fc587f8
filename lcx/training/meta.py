"""What a checkpoint says of itself beside its arrays: its place in the run, and what a later reader needs to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.positions.registry import from_config, to_config
from lcx.positions.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Meta:
    """Where in its run a checkpoint was taken, and what a later reader needs to use it.

    `stage_step` is also the loader's state: the next batch of stage `stage_index`. `attempt` counts the monitor's rollbacks of
    the stage. `positions` holds the scheme in force for each layer kind, `length` the declared length. `losses`,
    `probe_before` and `reference` are what the monitor has recorded of the stage so far. `base`: `path` and `fingerprint` of the
    model whose weights the checkpoint lacks because the run does not train them.
    """

    stage: str
    stage_index: int
    attempt: int
    stage_step: int
    step: int
    length: int
    seed: int
    config: str
    positions: dict[str, Any]
    losses: tuple[float, ...] = ()
    probe_before: dict[str, float] | None = None
    reference: dict[str, float] | None = None
    base: dict[str, str] | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """(stage, attempt, step within the stage), which sorts in the order of the run."""
        return self.stage_index, self.attempt, self.stage_step

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layer kind (or `default`) -> scheme in force."""
        return {kind: from_config(values) for kind, values in self.positions.items()}


def scheme_configs(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Schemes as stored in `Meta.positions`."""
    return {kind: to_config(scheme) for kind, scheme in schemes.items()}
