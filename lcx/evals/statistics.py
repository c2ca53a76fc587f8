"""How certain a mean is: intervals of shares, of mean scores and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

Z = 1.959963985
"""Half-width of a 95% interval in standard errors."""

RESAMPLES = 2000
"""Draws of a bootstrap."""

FEW = 10
"""Items below which a bootstrap's interval is far too narrow."""


def wilson(correct: float, items: int, z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), 95% by default; (0, 1) when there are no items."""
    if items <= 0:
        return 0.0, 1.0
    share, square = correct / items, z * z
    centre = (share + square / (2 * items)) / (1 + square / items)
    half = z * math.sqrt(share * (1 - share) / items + square / (4 * items * items)) / (1 + square / items)
    # At 0 and at all the formula gives the bound exactly, up to rounding.
    return (0.0 if correct <= 0 else max(0.0, centre - half)), (1.0 if correct >= items else min(1.0, centre + half))


def interval(scores: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% interval of a mean of scores from 0 to 1: Wilson's if every score is one of the two or there are fewer than `FEW`, as no
    other scores of that mean vary more; otherwise the percentile bootstrap of `resamples` draws."""
    if _binary(scores) or len(scores) < FEW:
        return wilson(sum(scores), len(scores))
    return _percentiles(_resampled(np.asarray(scores), resamples, np.random.default_rng(0)))


class Difference(NamedTuple):
    """The mean of paired differences with its 95% interval, and how many of them are above and below 0."""

    mean: float
    low: float
    high: float
    above: int
    below: int


def paired(before: Sequence[float], after: Sequence[float]) -> Difference:
    """`after` minus `before` on the same items.

    The interval is Agresti and Min's (2005) if every score is 0 or 1, which is not empty where no item changes; otherwise Student's
    below `FEW` items, without bounds for a single one, and the percentile bootstrap over items above. Raises `ValueError` if there
    are none, or not as many of both.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"{len(before)} and {len(after)} scores cannot be paired")
    gaps = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    above, below, n = int(np.sum(gaps > 0)), int(np.sum(gaps < 0)), len(gaps)
    if _binary(before) and _binary(after):
        centre = (above - below) / (n + 2)
        half = Z * math.sqrt(max(0.0, (above + below + 1) - (above - below) ** 2 / (n + 2))) / (n + 2)
        low, high = max(-1.0, centre - half), min(1.0, centre + half)
    elif n == 1:
        low, high = -math.inf, math.inf
    elif n < FEW:
        half = float(scipy.special.stdtrit(n - 1, 0.975)) * float(np.std(gaps, ddof=1)) / math.sqrt(n)
        low, high = float(gaps.mean()) - half, float(gaps.mean()) + half
    else:
        low, high = _percentiles(_resampled(gaps, RESAMPLES, np.random.default_rng(0)))
    return Difference(float(gaps.mean()), low, high, above, below)


def drawn_means(scores: Sequence[float], draws: int, rng: np.random.Generator) -> np.ndarray:
    """`[draws]` means that these scores leave possible.

    Shares are drawn from their posterior under Jeffreys' prior (Brown, Cai and DasGupta 2001), which a cell without a wrong answer
    does not pin to 1; other scores are resampled.
    """
    if _binary(scores):
        right = sum(scores)
        return rng.beta(right + 0.5, len(scores) - right + 0.5, draws)
    return _resampled(np.asarray(scores), draws, rng)


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _resampled(values: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    return values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
