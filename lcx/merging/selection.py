"""The k largest of many numbers that come in blocks: exactly, in one pass that keeps next to nothing, or rarely three.

A sample brackets the threshold; a pass counts what lies above the bracket and keeps what lies inside (Floyd and Rivest, "Expected
time bounds for selection", 1975). Where the sample misled, a pass that counts by upper bits finds a bracket for certain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from lcx.merging.tensors import Block, Tensor

Measure = Callable[[Block], np.ndarray]
"""From a block to one float32, finite and not negative (nor -0), for each of its entries."""

SAMPLE = 1 << 20
SAMPLED_BLOCKS = 64
"""How many numbers a sample has, and from how many blocks."""

MARGIN = 0.005
"""The share of all numbers that a bracket is to hold on either side of the threshold."""

HALF = 16
BINS = 1 << (HALF - 1)
"""Of float32s without a sign."""


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
    bracket = _guess(tensor, k / tensor.size, measure)
    above, values, counts = _sorted(found := _inside(tensor, measure, bracket))
    if not above < k <= above + counts.sum():
        bracket = _counted(tensor, k, measure)
        above, values, counts = _sorted(found := _inside(tensor, measure, bracket))
    from_above = above + np.cumsum(counts[::-1])[::-1]
    place = len(values) - 1 - int(np.searchsorted(from_above[::-1], k))
    threshold, left = values[place], k - int(from_above[place] - counts[place])
    ties = []
    for _, inside, times in found:
        ties.append(min(left, int(times[inside == threshold].sum())))
        left -= ties[-1]
    return Largest(float(threshold), tuple(ties))


Inside = list[tuple[int, np.ndarray, np.ndarray]]
"""Of each block: how many numbers lie above a bracket, those inside it (each once, in order), and how often each is there."""


def _inside(tensor: Tensor, measure: Measure, bracket: tuple[np.float32, np.float32]) -> Inside:
    def look(block: Block) -> tuple[int, np.ndarray, np.ndarray]:
        measured = measure(block)
        above = int(np.count_nonzero(measured > bracket[1]))
        inside = measured[(measured >= bracket[0]) & (measured <= bracket[1])]
        return above, *np.unique(inside, return_counts=True)

    return list(tensor.over(look))


def _sorted(found: Inside) -> tuple[int, np.ndarray, np.ndarray]:
    """How many numbers lie above the bracket; those inside in order, and how often each is there, over all blocks."""
    values, where = np.unique(np.concatenate([values for _, values, _ in found]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, where, np.concatenate([counts for _, _, counts in found]))
    return sum(above for above, _, _ in found), values, counts


def _guess(tensor: Tensor, share: float, measure: Measure) -> tuple[np.float32, np.float32]:
    """A bracket that most likely holds the threshold: from a sample, with `MARGIN` on both sides."""
    every = -(-tensor.blocks // SAMPLED_BLOCKS)
    each = max(1, SAMPLE // min(SAMPLED_BLOCKS, tensor.blocks))
    samples = []
    for index in range(0, tensor.blocks, every):
        measured = measure(tensor.block(index)).reshape(-1)
        samples.append(measured[:: -(-measured.size // each)])
    sample = np.sort(np.concatenate(samples))
    places = np.array([1 - share - MARGIN, 1 - share + MARGIN]) * len(sample)
    low, high = np.clip([np.floor(places[0]), np.ceil(places[1])], 0, len(sample) - 1).astype(int)
    return sample[low], sample[high]


def _counted(tensor: Tensor, k: int, measure: Measure) -> tuple[np.float32, np.float32]:
    """A bracket that holds the threshold: the numbers that share its upper 16 bits, whose order is that of the numbers."""
    counts = tensor.total(lambda block: np.bincount(measure(block).reshape(-1).view(np.uint32) >> HALF, minlength=BINS))
    upper = BINS - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), k))
    low, high = np.array([upper << HALF, (upper << HALF) + (1 << HALF) - 1], np.uint32).view(np.float32)
    return np.float32(low), np.float32(high)
