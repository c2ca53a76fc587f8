"""Positions that the loader assigns in training so that short rows cover the positions of long ones. NumPy only.

Legend: T tokens of one document.
"""

from __future__ import annotations

import numpy as np

from lcx.core.errors import UserError


def pose(positions: np.ndarray, rng: np.random.Generator, target_length: int, chunks: int = 2) -> np.ndarray:
    """PoSE (arXiv 2309.10400): the document is cut into `chunks` at random places, with random skips between them.

    int32 `[T]`, increasing, below `positions[0] + target_length`; with two chunks the skip is uniform on 0..target - T. Raises
    `UserError` if the target is shorter than the document.
    """
    positions = np.asarray(positions)
    length = len(positions)
    if target_length < length:
        raise UserError(f"pose.target_length={target_length} is below the {length} tokens of a document; raise it")
    if not 1 <= chunks <= max(1, length):
        raise UserError(f"pose.chunks={chunks} must be between 1 and the {length} tokens of a document")
    cuts = np.sort(rng.choice(np.arange(1, length), size=chunks - 1, replace=False)) if chunks > 1 else np.zeros(0, np.int64)
    skips = np.sort(rng.integers(0, target_length - length, size=chunks - 1, endpoint=True))
    skip = np.zeros(length, np.int64)
    np.add.at(skip, cuts, np.diff(skips, prepend=0))
    return (positions + np.cumsum(skip)).astype(np.int32)


def randomized(length: int, rng: np.random.Generator, max_position: int) -> np.ndarray:
    """Randomized positions (arXiv 2305.16843): a sorted sample without replacement from 0..max_position - 1, int32 `[T]`.

    Raises `UserError` if there are fewer positions than tokens.
    """
    if max_position < length:
        raise UserError(f"randomized.max_position={max_position} is below the {length} tokens of a document; raise it")
    return np.sort(rng.choice(max_position, size=length, replace=False, shuffle=False)).astype(np.int32)
