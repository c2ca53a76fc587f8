"""Fits a composed prompt to a length in tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FULL = 0.995
"""A prompt that fills this share of its budget is not fitted any closer."""


def largest(compose: Callable[[int], tuple[int, T]], budget: int, least: int, guess: int) -> tuple[int, int, T] | None:
    """(units, tokens, sample) of the largest sample that has at most `budget` tokens, or fills `FULL` of it; None if none fits.

    `compose(units)` returns (tokens, sample), which must grow with `units`, evenly on the whole, and be the same for the same
    number. Units are found by interpolation between the closest sizes on both sides, in a handful of calls from any `guess`.
    """
    # Composing is cheap beside counting tokens, and sizes are nearly proportional, so that two or three calls suffice.
    low: tuple[int, int, T] | None = None
    high: tuple[int, int] | None = None
    units, calls = max(guess, least), 0
    while True:
        tokens, sample = compose(units)
        calls += 1
        if tokens <= budget:
            low = (units, tokens, sample)
            if tokens >= FULL * budget:
                return low
        elif units == least:
            return None
        else:
            high = (units, tokens)
        if low is not None and high is not None and high[0] - low[0] <= 1:
            return low
        units = _next(low, high, budget, least, calls)


def _next(low: tuple | None, high: tuple[int, int] | None, budget: int, least: int, calls: int) -> int:
    """Where the middle of the band that is full enough should lie, strictly between the closest sizes on both sides."""
    target = (1 + FULL) / 2 * budget
    if low is None:
        assert high is not None
        return max(least, min(high[0] - 1, int(high[0] * target / high[1])))
    if high is None:
        return max(low[0] + 1, int(low[0] * target / max(low[1], 1)))
    if calls > 8:
        return (low[0] + high[0]) // 2
    share = (target - low[1]) / (high[1] - low[1])
    return min(high[0] - 1, max(low[0] + 1, low[0] + round(share * (high[0] - low[0]))))
