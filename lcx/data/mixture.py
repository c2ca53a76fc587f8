"""A mixture as a random-access dataset of row addresses: the part that a row belongs to, and its number within the part.

The mixing is grain's, at the `MapDataset` level: a single dataset, however many parts, without threads or state.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

# Grain mixes single integers fastest, so an address is part * _STRIDE + row.
_STRIDE = 1 << 40
_ENDLESS = 1 << 31


def addresses(weights: Sequence[float], sizes: Sequence[int | None], keys: Sequence[tuple[int, ...]]) -> grain.MapDataset:
    """Endless dataset whose element i is the address of row i.

    Parts appear in proportion to `weights` (above 0), evenly spaced rather than drawn. `sizes` are the numbers of rows of the
    parts, which come in a new random order each epoch, seeded by the part's own entry of `keys`; None is a part that never
    repeats a row.
    """
    parts = []
    for part, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        rows = grain.MapDataset.range(part * _STRIDE, part * _STRIDE + (size or _ENDLESS))
        if size is not None:
            rows = rows.seed(int(np.random.SeedSequence(key).generate_state(1)[0])).shuffle()
        parts.append(rows.repeat())
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=list(weights))


def locate(dataset: grain.MapDataset, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, row), each int64 `[count]`, of elements `first` to `first + count - 1`."""
    found = np.fromiter((dataset[i] for i in range(first, first + count)), np.int64, count)
    return found // _STRIDE, found % _STRIDE
