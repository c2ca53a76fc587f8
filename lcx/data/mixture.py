"""A mixture as a random-access dataset of row addresses: the part that a row belongs to, and its number within the part.

Constant weights are mixed by grain, at the `MapDataset` level: a single dataset, however many parts, without threads or state.
Weights that change within a stage are planned for the whole stage at once.

Legend: N rows of a stage, P parts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np

# Grain mixes single integers fastest, so an address is part * _STRIDE + row.
_STRIDE = 1 << 40
_ENDLESS = 1 << 31


class Addresses(Protocol):
    """Element i is the address of row i."""

    def __getitem__(self, index: int) -> int: ...


def addresses(weights: Sequence[float], sizes: Sequence[int | None], keys: Sequence[tuple[int, ...]]) -> grain.MapDataset:
    """Endless dataset whose element i is the address of row i.

    Parts appear in proportion to `weights` (above 0), evenly spaced rather than drawn. `sizes` are the numbers of rows of the
    parts, which come in a new random order each epoch, seeded by the part's own entry of `keys`; None is a part that never
    repeats a row.
    """
    parts = _parts(sizes, keys)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=list(weights))


def changing(weights: np.ndarray, sizes: Sequence[int | None], keys: Sequence[tuple[int, ...]]) -> Addresses:
    """As `addresses`, for one stage whose row i has `weights[i]` (float64 `[N, P]`, with a sum above 0).

    A part's own rows come in the order that they have at constant weights.
    """
    return _Changing(_parts(sizes, keys), interleave(weights / weights.sum(axis=1, keepdims=True)))


def interleave(shares: np.ndarray) -> np.ndarray:
    """The part of each row, int64 `[N]`, for shares float64 `[N, P]` that sum to 1 in each row.

    After any number of rows each part has had the sum of its shares to less than one row, so in any window to less than two.
    The rule is Tijdeman's (The chairman assignment problem, 1980): of the parts that are behind by at least
    s = 1 / (2P - 2), the next row goes to the one that would be the first to be behind by 1 - s.
    """
    total, parts = shares.shape
    if parts == 1:
        return np.zeros(total, np.int64)
    slack = 1 / (2 * parts - 2)
    release, deadline = [], []
    for column in shares.T:
        due = np.cumsum(column)
        counts = np.arange(int(due[-1]) + 2)
        release.append([*np.searchsorted(due, counts + slack).tolist(), total])
        deadline.append([*np.searchsorted(due, counts + 1 - slack).tolist(), total])
    chosen, given = np.empty(total, np.int64), [0] * parts
    # The next row of each part is in one of two heaps: it is not due yet, or it can come now.
    waiting, ready = [(release[part][0], deadline[part][0], part) for part in range(parts)], []
    heapq.heapify(waiting)
    for row in range(total):
        while waiting and waiting[0][0] <= row:
            heapq.heappush(ready, heapq.heappop(waiting)[1:])
        # None may be ready by a rounding; then the next one to be is.
        part = heapq.heappop(ready)[1] if ready else heapq.heappop(waiting)[2]
        chosen[row] = part
        given[part] += 1
        heapq.heappush(waiting, (release[part][given[part]], deadline[part][given[part]], part))
    return chosen


def locate(dataset: Addresses, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, row), each int64 `[count]`, of elements `first` to `first + count - 1`."""
    found = np.fromiter((dataset[i] for i in range(first, first + count)), np.int64, count)
    return found // _STRIDE, found % _STRIDE


class _Changing:
    def __init__(self, parts: list[grain.MapDataset], chosen: np.ndarray) -> None:
        self._parts, self._chosen, self._number = parts, chosen, np.empty_like(chosen)
        for part in range(len(parts)):
            own = np.flatnonzero(chosen == part)
            self._number[own] = np.arange(len(own))

    def __getitem__(self, index: int) -> int:
        return self._parts[self._chosen[index]][int(self._number[index])]


def _parts(sizes: Sequence[int | None], keys: Sequence[tuple[int, ...]]) -> list[grain.MapDataset]:
    parts = []
    for part, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        rows = grain.MapDataset.range(part * _STRIDE, part * _STRIDE + (size or _ENDLESS))
        if size is not None:
            rows = rows.seed(int(np.random.SeedSequence(key).generate_state(1)[0])).shuffle()
        parts.append(rows.repeat())
    return parts
