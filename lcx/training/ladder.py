"""The thetas that the monitor may try for a stage, and which attempt its decisions so far call for.

`choose` needs no data and no devices: what a run would do next follows from its config and the rows of `decisions.jsonl`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.core.errors import UserError
from lcx.positions.derive import with_theta
from lcx.positions.registry import from_config
from lcx.positions.scheme import Scheme
from lcx.positions.theta import retries
from lcx.training.monitor import MonitorConfig
from lcx.training.stages import RunConfig, StageConfig, override

Decisions = Sequence[Mapping[str, Any]]
"""Rows of `decisions.jsonl`."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One go at a stage: number `index`, at `theta` (None: the scheme as configured), judged by the monitor if `watched`."""

    index: int = 0
    theta: float | None = None
    watched: bool = False


@dataclasses.dataclass(frozen=True)
class PreviousStage:
    """What the weights at a stage's start were trained with: schemes by layer kind (or `default`) and length in tokens."""

    schemes: dict[str, Scheme]
    length: int

    @property
    def theta(self) -> float | None:
        """The theta on the layers that see the whole context; None without a rotary scheme."""
        return theta_of(self.schemes)


def choose(
    run: RunConfig, decisions: Decisions, index: int, before_first: PreviousStage | None
) -> tuple[Attempt, dict[str, Scheme]]:
    """The attempt at stage `index` that the decisions call for, and the schemes in force in it."""
    current = {kind: from_config(spec, f"positions.{kind}") for kind, spec in run.positions.items()}
    attempt, previous = Attempt(), before_first
    for i, stage in enumerate(run.stages[: index + 1]):
        named = bool(stage.positions) or i == 0 and previous is None
        current = override(current, stage, previous.length if previous else None)
        theta = theta_of(current)
        rows = [row for row in decisions if row["stage"] == stage.name]
        attempt = attempt_of(rows, _ladder(run, stage, named, theta, previous)) if run.monitored(stage) else Attempt()
        if attempt.theta is not None:
            current = at_theta(current, attempt.theta)
        previous = PreviousStage(current, stage.length)
    return attempt, current


def attempt_of(rows: Decisions, ladder: Sequence[float | None]) -> Attempt:
    """The attempt that a stage's decisions call for: the accepted one, the next theta, or the best when all have failed."""
    if rows and rows[-1]["verdict"] == "straight down":
        return Attempt(rows[-1]["attempt"], rows[-1]["theta"], False)
    if len(rows) < len(ladder):
        return Attempt(len(rows), ladder[len(rows)], True)
    chosen = best(rows)
    # The last attempt continues; an earlier one has to be rerun.
    again = chosen["attempt"] != rows[-1]["attempt"]
    return Attempt(len(rows) if again else len(rows) - 1, chosen["theta"], False)


def _ladder(
    run: RunConfig, stage: StageConfig, named: bool, theta: float | None, previous: PreviousStage | None
) -> Sequence[float | None]:
    """The thetas that a monitored stage may try; `named`: its config asks for `theta`, which then comes first."""
    ladder = list(stage.thetas)
    if not ladder and previous is None:
        raise UserError(
            f"stages.{stage.name}.monitor=True has nothing to compare with in a first stage from scratch; "
            f"set stages.{stage.name}.thetas"
        )
    if not ladder and previous.theta is not None and theta is not None:
        ladder = thetas(run.monitor, (), theta if named else None, (previous.theta, previous.length), stage.length)
    return ladder or [None]


def thetas(
    config: MonitorConfig, given: Sequence[float], first: float | None, trained: tuple[float, int], target: int
) -> list[float]:
    """The thetas that a stage may try, in order: `given` if there are any, else `first` (the config's own, if it names one)
    and those around the critical base of `trained` (theta, length) at `target`; at most `config.retries` after the first."""
    if given:
        return list(given)
    theta, length = trained
    around = retries(theta, length, target) if target > length else []
    ladder = [] if first is None else [first]
    for candidate in around:
        if all(abs(candidate / known - 1) > 0.05 for known in ladder):
            ladder.append(candidate)
    return ladder[: config.retries + 1]


def theta_of(schemes: Mapping[str, Scheme]) -> float | None:
    """The theta that a ladder varies: that of the first layer kind that is not local and has one."""
    return next((schemes[kind].theta for kind in sorted(schemes) if _turns(kind, schemes[kind])), None)


def at_theta(schemes: Mapping[str, Scheme], theta: float) -> dict[str, Scheme]:
    """The schemes with another theta, except on local layers: a window never sees the new distances."""
    return {kind: with_theta(scheme, theta) if _turns(kind, scheme) else scheme for kind, scheme in schemes.items()}


def _turns(kind: str, scheme: Scheme) -> bool:
    return not kind.startswith("local") and getattr(scheme, "theta", None) is not None


def best(decisions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The decision (as written to `decisions.jsonl`) with the best probe: by needle loss, then by text loss."""

    def rank(decision: Mapping[str, Any]) -> tuple[float, float]:
        values = decision["probe_after"]
        return tuple(x if math.isfinite(x) else math.inf for x in (values["needle_loss"], values["text_loss"]))

    return min(decisions, key=rank)
