"""The k largest of many numbers that come in blocks: exactly, in two passes that keep next to nothing.

The bits of a float32 that is not negative are in the order of the numbers: one pass counts the upper 16 bits, one the lower 16 of
those that share the threshold's upper ones (a radix selection).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from lcx.merging.tensors import Block, Tensor

Measure = Callable[[Block], np.ndarray]
"""From a block to one float32, finite and not negative, for each of its entries."""

HALF = 16
BINS = 1 << HALF


@dataclasses.dataclass(frozen=True)
class Largest:
    """The k largest: all above `threshold`, and of those equal to it the first `ties[block]` of each block."""

    threshold: float
    ties: tuple[int, ...]

    def mask(self, measured: np.ndarray, block: int) -> np.ndarray:
        """Which entries of a block are among the k largest; bool, of the shape of `measured`."""
        kept = measured > np.float32(self.threshold)
        if count := self.ties[block]:
            equal = np.flatnonzero(measured == np.float32(self.threshold))
            kept.reshape(-1)[equal[:count]] = True
        return kept


def largest(tensor: Tensor, k: int, measure: Measure) -> Largest:
    """The `k` largest of what `measure` finds in all blocks of a tensor; `k` of at most 0 is none, of at least its size all.

    Of numbers equal to the threshold those that come first are taken, so that there are exactly `k`.
    """
    if k <= 0:
        return Largest(np.inf, (0,) * tensor.blocks)
    if k >= tensor.size:
        return Largest(-1.0, (0,) * tensor.blocks)
    upper, above = _place(tensor.total(lambda block: _count(_bits(measure(block)) >> HALF)), k)
    within = list(tensor.over(lambda block: _shared(_bits(measure(block)), upper)))
    lowers = np.zeros(BINS, np.int64)
    for low, counts in within:
        lowers[low] += counts
    lower, higher = _place(lowers, k - above)
    left = k - above - higher
    ties = []
    for low, counts in within:
        equal = int(counts[low == lower].sum())
        ties.append(min(left, equal))
        left -= ties[-1]
    return Largest(float(np.array(upper << HALF | lower, np.uint32).view(np.float32)), tuple(ties))


def _place(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in higher bins."""
    from_above = np.cumsum(counts[::-1])
    found = int(np.searchsorted(from_above, k))
    return len(counts) - 1 - found, int(from_above[found - 1]) if found else 0


def _bits(measured: np.ndarray) -> np.ndarray:
    # A zero's sign would make it the largest of all.
    return np.ascontiguousarray(measured, np.float32).reshape(-1).view(np.uint32) & 0x7FFFFFFF


def _count(halves: np.ndarray) -> np.ndarray:
    return np.bincount(halves, minlength=BINS)


def _shared(bits: np.ndarray, upper: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower halves of those with this upper half, each once, and how often each is there."""
    return np.unique((bits[bits >> HALF == upper] & (BINS - 1)).astype(np.uint16), return_counts=True)
