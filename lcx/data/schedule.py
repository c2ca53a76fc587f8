"""Weights of a mixture's parts that change within a stage: straight lines between knots.

A knot is (place, weight). Places run from 0 to 1, the share of the stage's steps, or from 0 to at least the number of the stage's
tokens; two knots at one place are a jump.

Legend: K knots, N rows of a stage, P parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lcx.core.errors import UserError

Knots = tuple[tuple[float, float], ...]


def over_stage(where: str, knots: Knots, tokens: int) -> Knots:
    """`knots` with places from 0 to exactly 1, for a stage of `tokens` tokens (places with padding count).

    Raises `UserError`, which begins with `where`, for negative weights, unsorted places, and knots that do not cover the stage.
    """
    if len(knots) < 2:
        raise UserError(f"{where}={knots} has too few knots; give a weight, or at least the knots of the stage's start and end")
    places, weights = np.asarray(knots, np.float64).T
    if not np.isfinite(places).all() or not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError(f"{where}={knots} must hold finite places and weights that are not negative")
    if (np.diff(places) < 0).any():
        raise UserError(f"{where}={knots} is not sorted; give knots (place, weight) in the order of their places")
    total = 1 if places[-1] <= 1 else tokens
    if places[0] != 0 or places[-1] < total:
        raise UserError(
            f"{where}={knots} covers {places[0]:g} to {places[-1]:g}; its places must go from 0 to 1, as shares of the stage's "
            f"steps, or to its {tokens:,} tokens"
        )
    inside = places < total
    at_end = weights[places == total]  # the first of a jump there
    ends = float(at_end[0] if len(at_end) else np.interp(total, places, weights))
    return (*zip((places[inside] / total).tolist(), weights[inside].tolist(), strict=True), (1.0, ends))


def mean(knots: Knots) -> float:
    """The average weight over the stage; `knots` are of `over_stage`. That of a constant weight is exactly itself."""
    if is_constant(knots):
        return knots[0][1]
    return math.fsum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in zip(knots, knots[1:], strict=False))


def is_constant(knots: Knots) -> bool:
    """Whether all knots have the same weight."""
    return len({weight for _, weight in knots}) == 1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the weights of some parts (`knots`, by name, of `over_stage`) run through a stage of `steps` steps."""

    steps: int
    knots: Mapping[str, Knots]

    def weights(self, names: Sequence[str], constant: Sequence[float], rows: int) -> np.ndarray:
        """The weights of the parts `names` in the middle of each row of the stage, float64 `[N, P]`, where N is `steps * rows`.

        `constant` `[P]` are the weights of parts without knots. Raises `UserError` if all weights are 0 somewhere.
        """
        total = self.steps * rows
        middles = (np.arange(total) + 0.5) / total
        columns = [
            np.interp(middles, *np.asarray(self.knots[name]).T) if name in self.knots else np.full(total, weight)
            for name, weight in zip(names, constant, strict=True)
        ]
        found = np.stack(columns, axis=1)
        if not (found.sum(1) > 0).all():
            step = int(np.argmin(found.sum(1) > 0)) // rows
            raise UserError(f"all parts ({', '.join(names)}) have weight 0 at step {step}; give one of them a weight there")
        return found
