"""Nearest neighbours by cosine, and the path through them that in-context pretraining writes documents in (arXiv:2310.10638).

Neighbours are found by comparing all vectors, a block at a time: below a million there is no need for an index. Of equal
similarities the one with the smaller number counts as nearer, so that the result does not depend on how sorting breaks ties.

Legend: D vectors, Q queries, E their dimensions, k neighbours.
"""

from __future__ import annotations

import itertools

import numpy as np

BLOCK = 1 << 25
"""Similarities held at once, 4 bytes each."""


def nearest(similarity_D: np.ndarray, k: int) -> np.ndarray:
    """Numbers int64 `[<= k]` of the largest similarities, in falling order, without those that are -inf."""
    k = min(k, len(similarity_D))
    if k == 0:
        return np.zeros(0, np.int64)
    least = np.partition(similarity_D, len(similarity_D) - k)[len(similarity_D) - k]
    found = np.flatnonzero((similarity_D >= least) & (similarity_D > -np.inf))
    return found[np.argsort(-similarity_D[found], kind="stable")][:k]


def neighbours(vectors_DE: np.ndarray, k: int, max_similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges (from int64, to int64, similarity float32) from each of the normalised vectors to its k nearest others, by `from`.

    Those with a similarity above `max_similarity` are no neighbours.
    """
    total = len(vectors_DE)
    rows = max(1, BLOCK // max(1, total))
    starts, ends, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for first in range(0, total, rows):
        similarity_QD = vectors_DE[first : first + rows] @ vectors_DE.T
        similarity_QD[similarity_QD > max_similarity] = -np.inf
        for i, row in enumerate(similarity_QD):
            row[first + i] = -np.inf
            found = nearest(row, k)
            starts.append(np.full(len(found), first + i))
            ends.append(found)
            values.append(row[found])
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(values)


def path(vectors_DE: np.ndarray, k: int, max_similarity: float) -> tuple[list[int], list[int]]:
    """An order of the vectors from neighbour to neighbour, each once, and the numbers that found no place in it.

    Two vectors are joined if one is among the k nearest of the other. The path begins at the vector with the fewest neighbours,
    which would be the hardest to reach later, and goes on to the nearest unvisited neighbour; where there is none, to the unvisited
    one with the fewest neighbours. Vectors with a similarity above `max_similarity` never follow one another; one whose every place
    would be behind such a vector is left out.
    """
    start, end, value = neighbours(vectors_DE, k, max_similarity)
    edges = np.concatenate([np.stack([start, end]), np.stack([end, start])], axis=1)
    value = np.concatenate([value, value])
    order = np.lexsort((edges[1], -value, edges[0]))
    edges = edges[:, order]
    # An edge that both ends chose is there twice.
    new = np.ones(edges.shape[1], bool)
    new[1:] = (edges[:, 1:] != edges[:, :-1]).any(axis=0)
    edges = edges[:, new]
    bounds = np.searchsorted(edges[0], np.arange(len(vectors_DE) + 1))
    waiting = np.lexsort((np.arange(len(vectors_DE)), np.diff(bounds))).tolist()
    visited, found, first = np.zeros(len(vectors_DE), bool), [], 0
    while len(found) < len(waiting):
        following = None
        if found:
            others = edges[1, bounds[found[-1]] : bounds[found[-1] + 1]]
            others = others[~visited[others]]
            following = int(others[0]) if len(others) else None
        if following is None:
            while visited[waiting[first]]:
                first += 1
            rest = (one for one in itertools.islice(waiting, first, None) if not visited[one])
            following = next((one for one in rest if not found or _apart(vectors_DE, found[-1], one, max_similarity)), None)
        if following is None:
            break
        visited[following] = True
        found.append(following)
    return found, np.flatnonzero(~visited).tolist()


def _apart(vectors_DE: np.ndarray, one: int, other: int, max_similarity: float) -> bool:
    return float(vectors_DE[one] @ vectors_DE[other]) <= max_similarity
