"""Chunks of a document, and the hard negatives that are written between them (NExtLong, arXiv:2501.12766).

Legend: C chunks of all documents, m chunks of one document, E dimensions of a vector.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from lcx.data.curation.assemble import neighbours


def ends(text: str, most: int) -> list[int]:
    """Where the chunks of a text end, in bytes: as many whole lines as have at most `most` characters; a longer line is cut."""
    found, chars, at = [], 0, 0
    *lines, last = text.split("\n")
    for line in itertools.chain((f"{line}\n" for line in lines), [last]):
        for i in range(0, len(line), most):
            piece = line[i : i + most]
            if chars and chars + len(piece) > most:
                found.append(at)
                chars = 0
            chars += len(piece)
            at += len(piece.encode())
    return [*found, at] if chars else found


@dataclasses.dataclass(frozen=True)
class Chunks:
    """All chunks: `document` int64, `length` int64 `[C]` in the unit of the target, `vectors` float32 `[C, E]`, normalised."""

    document: np.ndarray
    length: np.ndarray
    vectors: np.ndarray


class Pool:
    """The chunks that may be negatives; those that were taken are not offered again, unless they may be reused."""

    def __init__(self, chunks: Chunks, members: np.ndarray, max_similarity: float, reuse: bool) -> None:
        self._chunks, self._ids, self._max, self._reuse = chunks, np.flatnonzero(members), max_similarity, reuse
        self._vectors, self._free = chunks.vectors[self._ids], np.ones(len(self._ids), bool)

    @property
    def has_free(self) -> bool:
        """Whether some chunks have not been taken."""
        return bool(self._free.any())

    def compose(self, anchors: Sequence[int], target: int, gap: int, limits: tuple[int, int]) -> list[int] | None:
        """Chunks of one document: `anchors`, each with its nearest negatives behind it, up to the chunk that reaches `target`.

        Every anchor gets the same number of negatives, the smallest within `limits` that suffices, and the last one those that
        are needed; None if no number does. A chunk stands in the document once. `gap` lies between two chunks. On success the
        negatives count as taken.
        """
        if not len(self._ids):
            return None
        # More anchors than these would not be needed, nor would their similarities fit into memory.
        enough = int(np.searchsorted(np.cumsum(self._chunks.length[anchors]), target)) + 1
        anchors = list(anchors[: min(enough, max(1, neighbours.BLOCK // len(self._ids)))])
        similarity, (low, high) = self._similarity(np.asarray(anchors)), limits
        missing = target - int(self._chunks.length[anchors].sum())
        usual = float(self._chunks.length[self._ids].mean()) + gap
        count = min(high, max(low, round(missing / (usual * len(anchors)))))
        best = self._fill(anchors, similarity, count, target, gap)
        while best is None and count < high:
            count += 1
            best = self._fill(anchors, similarity, count, target, gap)
        while best is not None and count > low:
            count -= 1
            if (smaller := self._fill(anchors, similarity, count, target, gap)) is None:
                break
            best = smaller
        if best is None:
            return None
        chunks, taken = best
        self._free[taken] = self._reuse
        return chunks

    def _similarity(self, anchors: np.ndarray) -> np.ndarray:
        """float32 `[m, pool]`, -inf where a chunk is no negative of an anchor."""
        similarity = self._chunks.vectors[anchors] @ self._vectors.T
        similarity[similarity > self._max] = -np.inf
        similarity[:, ~self._free] = -np.inf
        similarity[self._chunks.document[anchors][:, None] == self._chunks.document[self._ids]] = -np.inf
        return similarity

    def _fill(
        self, anchors: list[int], similarity: np.ndarray, count: int, target: int, gap: int
    ) -> tuple[list[int], list[int]] | None:
        """The chunks, and the places in the pool of the negatives among them; None if they do not reach the target."""
        found, taken, length, used = [], [], -gap, np.zeros(len(self._ids), bool)
        for anchor, row in zip(anchors, similarity, strict=True):
            negatives = neighbours.nearest(np.where(used, -np.inf, row), count)
            for place in (None, *negatives.tolist()):
                chunk = anchor if place is None else int(self._ids[place])
                found.append(chunk)
                if place is not None:
                    taken.append(place)
                    used[place] = True
                length += gap + int(self._chunks.length[chunk])
                if length >= target:
                    return found, taken
            if len(negatives) < count:
                return None
        return None
