"""How varied a set of vectors is, and subsets of it that are more so.

Everything goes over the vectors in blocks, so that they may be mapped from a file, and gives the same for the same seed. Vectors
are of length 1, except those of empty documents, which are zero. Legend: D documents, E embedding dimensions, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK = 1 << 11
FIT_PER_CLUSTER = 256
"""Documents for each cluster that k-means is fitted to at most; the others are assigned afterwards."""


class Rows:
    """Some rows of vectors `[D, E]` that are mapped from a file, of which only those asked for are read."""

    def __init__(self, x_DE: np.ndarray, places: np.ndarray) -> None:
        self._x_DE, self._places = x_DE, places
        self.shape = len(places), x_DE.shape[1]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows by number, slice or array of numbers."""
        return np.asarray(self._x_DE[self._places[key]])


Vectors = np.ndarray | Rows


def k_means(x_DE: Vectors, clusters: int, seed: int, iterations: int = 25) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spherical k-means: centers float32 `[K, E]` of length 1, the nearest one of each document, int32 `[D]`, and its cosine.

    K is at most D. A cluster that loses all its documents begins again at the document that is farthest from its center.
    """
    clusters = max(1, min(clusters, len(x_DE)))
    rng = np.random.Generator(np.random.PCG64(seed))
    fit = np.sort(rng.permutation(len(x_DE))[: FIT_PER_CLUSTER * clusters])
    sample_DE = np.array(x_DE[fit], np.float32)
    centers_KE = _plus_plus(sample_DE, clusters, rng)
    before = None
    for _ in range(iterations):
        labels_D, cosines_D = _nearest(sample_DE, centers_KE)
        if before is not None and (labels_D == before).all():
            break
        before = labels_D
        sums_KE = _sums(sample_DE, labels_D, clusters)
        for empty, far in zip(np.flatnonzero(np.bincount(labels_D, minlength=clusters) == 0), np.argsort(cosines_D), strict=False):
            sums_KE[empty] = sample_DE[far]
        lengths_K = np.linalg.norm(sums_KE, axis=1, keepdims=True)
        centers_KE = np.where(lengths_K > 0, sums_KE / np.where(lengths_K > 0, lengths_K, 1), centers_KE).astype(np.float32)
    return centers_KE, *_nearest(x_DE, centers_KE)


def _plus_plus(x_DE: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Documents to begin with, each drawn in proportion to its squared distance from those drawn before (k-means++)."""
    chosen = [int(rng.integers(len(x_DE)))]
    squared_D = np.einsum("de,de->d", x_DE, x_DE)

    def distance() -> np.ndarray:
        return np.maximum(squared_D + squared_D[chosen[-1]] - 2 * (x_DE @ x_DE[chosen[-1]]), 0)

    distance_D = distance()
    for _ in range(1, clusters):
        total = np.cumsum(distance_D, dtype=np.float64)
        place = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        chosen.append(min(place, len(x_DE) - 1))
        distance_D = np.minimum(distance_D, distance())
    return x_DE[chosen]


def _sums(x_DE: np.ndarray, labels_D: np.ndarray, clusters: int) -> np.ndarray:
    """The sum of each cluster's vectors, float64 `[K, E]`."""
    found_KE, order = np.zeros((clusters, x_DE.shape[1])), np.argsort(labels_D, kind="stable")
    there, starts = np.unique(labels_D[order], return_index=True)
    found_KE[there] = np.add.reduceat(x_DE[order], starts, axis=0, dtype=np.float64)
    return found_KE


def _nearest(x_DE: Vectors, centers_KE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The center int32 `[D]` with the highest cosine, and that float32 `[D]`."""
    labels, cosines = np.zeros(len(x_DE), np.int32), np.zeros(len(x_DE), np.float32)
    for at, block in _blocks(x_DE):
        products = block @ centers_KE.T
        labels[at : at + len(block)] = products.argmax(1)
        cosines[at : at + len(block)] = products.max(1)
    return labels, cosines


def k_center(x_DE: Vectors, count: int) -> np.ndarray:
    """Places int64 `[count]`, in the order of choosing: the first document, then always the one farthest from all chosen so far.

    The largest distance of a document to the chosen ones is at most twice the least that is possible (Gonzalez 1985, and
    arXiv:1708.00489).
    """
    count = min(count, len(x_DE))
    chosen = [0] if count else []
    distance_D = _squared_distances(x_DE, x_DE[0]) if count else np.zeros(0)
    while len(chosen) < count:
        distance_D[chosen[-1]] = -1  # of documents that are the same each is chosen once
        chosen.append(int(distance_D.argmax()))
        distance_D = np.minimum(distance_D, _squared_distances(x_DE, x_DE[chosen[-1]]))
    return np.array(chosen, np.int64)


def _squared_distances(x_DE: Vectors, to_E: np.ndarray) -> np.ndarray:
    """Squared distances float64 `[D]` to a vector."""
    found = np.zeros(len(x_DE))
    for at, block in _blocks(x_DE):
        apart = block.astype(np.float64) - to_E
        found[at : at + len(block)] = np.einsum("de,de->d", apart, apart)
    return found


def semantic_duplicates(
    x_DE: Vectors, labels_D: np.ndarray, centers_KE: np.ndarray, epsilon: float, keep: str, seed: int
) -> dict[int, int]:
    """SemDeDup (arXiv:2303.09540): place of a duplicate -> that of the most similar one in front of it.

    The documents of a cluster are put in order: the farthest from the center first (`keep` = hard), the nearest (easy), or at
    random. One goes if its cosine with any in front of it, dropped or not, is above 1 − epsilon.
    """
    found: dict[int, int] = {}
    rng = np.random.Generator(np.random.PCG64(seed))
    for cluster in range(len(centers_KE)):
        members = np.flatnonzero(labels_D == cluster)
        if len(members) < 2:
            continue
        x_ME = np.array(x_DE[members], np.float32)
        if keep == "random":
            order = rng.permutation(len(members))
        else:
            cosines = x_ME @ centers_KE[cluster]
            order = np.argsort(cosines if keep == "hard" else -cosines, kind="stable")
        x_ME, members = x_ME[order], members[order]
        for at, block in _blocks(x_ME):
            products = block @ x_ME[: at + len(block)].T
            products[np.arange(at + len(block)) >= at + np.arange(len(block))[:, None]] = -np.inf
            best = products.argmax(1)
            for row in np.flatnonzero(products[np.arange(len(block)), best] > 1 - epsilon).tolist():
                found[int(members[at + row])] = int(members[best[row]])
    return found


def quotas(sizes_K: np.ndarray, total: int, tau: float) -> np.ndarray:
    """How many of each cluster's documents to take, int64 `[K]`: in proportion to size^tau, at most all, `total` together.

    What a cluster is too small for goes to the others in the same proportion; fractions go to the largest ones first.
    """
    sizes_K = np.asarray(sizes_K, np.int64)
    total = min(total, int(sizes_K.sum()))
    weights_K = np.where(sizes_K > 0, np.maximum(sizes_K, 1).astype(np.float64) ** tau, 0)
    wanted_K, full_K = np.zeros(len(sizes_K)), sizes_K == 0
    while not full_K.all():
        left = total - sizes_K[full_K].sum()
        wanted_K = np.where(full_K, sizes_K, left * weights_K / weights_K[~full_K].sum())
        over_K = ~full_K & (wanted_K >= sizes_K)
        if not over_K.any():
            break
        full_K |= over_K
    wanted_K = np.minimum(wanted_K, sizes_K)
    found_K = np.floor(wanted_K + 1e-9).astype(np.int64)
    order = np.argsort(found_K - wanted_K, kind="stable")
    order = order[found_K[order] < sizes_K[order]]
    found_K[order[: total - int(found_K.sum())]] += 1
    return found_K


def cluster_balanced(labels_D: np.ndarray, total: int, tau: float, seed: int) -> np.ndarray:
    """Which documents to take, bool `[D]`: from each cluster at random as many as `quotas` says."""
    sizes_K = np.bincount(labels_D) if len(labels_D) else np.zeros(0, np.int64)
    rng, found = np.random.Generator(np.random.PCG64(seed)), np.zeros(len(labels_D), bool)
    for cluster, quota in enumerate(quotas(sizes_K, total, tau)):
        found[rng.permutation(np.flatnonzero(labels_D == cluster))[:quota]] = True
    return found


def vendi(x_DE: Vectors, q: float = 1.0) -> float:
    """Vendi score (arXiv:2210.02410), the effective number of different documents, of order q (arXiv:2310.12952).

    With λ the eigenvalues of the cosines divided by D: exp(−Σ λ ln λ) at q = 1, their number above zero at q = 0, 1/max λ at
    infinity, else exp(ln(Σ λ^q) / (1 − q)). Where D > E they are those of XᵀX / D. Zero vectors count for nothing.
    """
    if not len(x_DE):
        return 0.0
    if len(x_DE) > x_DE.shape[1]:
        gram = np.zeros((x_DE.shape[1], x_DE.shape[1]))
        for _, block in _blocks(x_DE):
            gram += block.astype(np.float64).T @ block.astype(np.float64)
    else:
        whole = x_DE[:].astype(np.float64)
        gram = whole @ whole.T
    values = np.linalg.eigvalsh(gram / len(x_DE))
    values = values[values > 1e-9]
    if not len(values):
        return 1.0
    values = values / values.sum()
    if q == 1:
        return float(math.exp(-(values * np.log(values)).sum()))
    if math.isinf(q):
        return float(1 / values.max())
    return float(math.exp(math.log((values**q).sum()) / (1 - q)))


def distance_to(x_DE: Vectors, reference_RE: np.ndarray) -> np.ndarray:
    """1 − the cosine with the nearest of some vectors, float32 `[D]`."""
    found = np.ones(len(x_DE), np.float32)
    for at, block in _blocks(x_DE):
        for _, other in _blocks(reference_RE):
            best = 1 - (block @ other.T).max(1)
            found[at : at + len(block)] = np.minimum(found[at : at + len(block)], best)
    return found


def plane(x_DE: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """The two directions of largest variance: coordinates float32 `[D, 2]`, and each one's share of the variance, float64 `[2]`."""
    mean_E, second_EE = np.zeros(x_DE.shape[1]), np.zeros((x_DE.shape[1], x_DE.shape[1]))
    for _, block in _blocks(x_DE):
        mean_E += block.sum(0, dtype=np.float64) / len(x_DE)
        second_EE += block.astype(np.float64).T @ block.astype(np.float64) / len(x_DE)
    values, vectors_EE = np.linalg.eigh(second_EE - np.outer(mean_E, mean_E))
    axes_E2 = vectors_EE[:, ::-1][:, :2]
    # An axis may point either way; its largest component decides.
    axes_E2 = axes_E2 * np.sign(axes_E2[np.abs(axes_E2).argmax(0), np.arange(axes_E2.shape[1])])
    found = np.zeros((len(x_DE), 2), np.float32)
    for at, block in _blocks(x_DE):
        found[at : at + len(block), : axes_E2.shape[1]] = (block - mean_E) @ axes_E2
    shares = np.maximum(values[::-1][:2], 0) / max(float(np.maximum(values, 0).sum()), 1e-30)
    return found, shares


def _blocks(x_DE: Vectors) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, len(x_DE), BLOCK):
        yield at, np.asarray(x_DE[at : at + BLOCK])
