"""The documents of a packed row, the pieces in which devices hold them, and how many query-key pairs there are between pieces.

Host code in NumPy. Legend: T tokens in a row, D documents, P pieces, n devices, S sets of keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lcx.core.batch import PADDING, SHARED
from lcx.core.mask import visible_pairs

Windows = Sequence[tuple[int | None, float]]
"""The windows of a model's kinds of layers (None: a layer sees whole documents), and the fraction of its layers of that kind."""

CAUSAL: Windows = ((None, 1.0),)


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a row in order: `lengths` int64 `[D]`, which add up to T, and the segment ids int64 `[D]` of their tokens.

    Padding and what all documents see (`SHARED`) are documents, too.
    """

    lengths: np.ndarray
    segments: np.ndarray

    @classmethod
    def of(cls, segments: np.ndarray) -> "Documents":
        """The documents of a row's segment ids int `[T]`; raises `ValueError` if one of them is in several places."""
        starts = np.concatenate([[0], np.flatnonzero(np.diff(segments)) + 1])
        found = cls(np.diff(np.append(starts, len(segments))), segments[starts].astype(np.int64))
        ids = found.segments[found.segments != PADDING]
        if len(np.unique(ids)) < len(ids):
            raise ValueError("a document of the row is in several places")
        return found

    @property
    def starts(self) -> np.ndarray:
        """Place in the row of each one's first token, int64 `[D]`."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def shared(self) -> np.ndarray:
        """Which of them every document sees, bool `[D]`."""
        return self.segments == SHARED

    def work(self, windows: Windows = CAUSAL) -> np.ndarray:
        """Pairs that a causal layer sees within each document, on average over the kinds of layers, float64 `[D]`."""
        pairs = sum(fraction * visible_pairs(self.lengths, window) for window, fraction in windows)
        return np.where(self.segments == PADDING, 0.0, pairs)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Runs of tokens on devices, int64 `[P]` each, in the order in which they lie there, device after device.

    `document`: its number; `start`: place in the row of the first of `length` tokens; `reach`: devices of the smallest ring that
    has all queries that see these keys, of those that are nested in the whole one.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    device: np.ndarray
    reach: np.ndarray

    @property
    def columns(self) -> np.ndarray:
        """Place in the row of each token, in the order in which the devices hold them, int64 `[T]`."""
        return ranges(self.start, self.length)

    def segments(self, documents: Documents) -> np.ndarray:
        """Segment ids of the tokens as the devices hold them, int64 `[T]`: documents are numbered as they lie there.

        Kernels skip tiles by the least and greatest id in them, which say little where documents far apart in a row lie together.
        """
        first = np.full(len(documents.lengths), len(self.document))
        np.minimum.at(first, self.document, np.arange(len(self.document)))
        number = np.empty(len(first), np.int64)
        number[np.argsort(first, kind="stable")] = np.arange(1, len(first) + 1)
        kept = (documents.segments == PADDING) | documents.shared
        return np.repeat(np.where(kept, documents.segments, number)[self.document], self.length)

    def cut(self, size: int) -> tuple["Pieces", np.ndarray]:
        """The same cut where a part of `size` tokens of a device ends, and the number of the part that each is in, `[P]`."""
        tokens = int(self.length[self.device == 0].sum())
        place = (np.cumsum(self.length) - self.length) % tokens
        first, last = place // size, (place + self.length - 1) // size
        whole, part = np.repeat(np.arange(len(place)), last - first + 1), ranges(first, last - first + 1)
        begin = np.maximum(place[whole], part * size)
        length = np.minimum(place[whole] + self.length[whole], (part + 1) * size) - begin
        start = self.start[whole] + begin - place[whole]
        return Pieces(self.document[whole], start, length, self.device[whole], self.reach[whole]), part


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`starts[i], starts[i] + 1, …`, `lengths[i]` of them, for each i in turn; int64."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def pair_counts(documents: Documents, pieces: Pieces, key_set: np.ndarray, sets: int, n: int, windows: Windows) -> np.ndarray:
    """Pairs of the queries of each device with the keys of each set, float64 `[n, S]`; `key_set` int `[P]` says which set the keys
    of a piece are in. Averages over the kinds of layers; pairs with what all documents see are left out."""
    found = np.zeros((n, sets))
    counted = documents.segments[pieces.document] != PADDING
    whole = counted & (pieces.length == documents.lengths[pieces.document])
    inside = sum(fraction * visible_pairs(pieces.length, window) for window, fraction in windows)
    np.add.at(found, (pieces.device[whole], key_set[whole]), np.asarray(inside)[whole])
    rest = np.flatnonzero(counted & ~whole)
    rest = rest[np.lexsort((pieces.start[rest], pieces.document[rest]))]
    for own in np.split(rest, np.flatnonzero(np.diff(pieces.document[rest])) + 1) if len(rest) else ():
        begin = pieces.start[own] - pieces.start[own[0]]
        used, number = np.unique(key_set[own], return_inverse=True)
        pairs = _pairs_within(begin, pieces.length[own], number, len(used), windows)
        np.add.at(found, (pieces.device[own][:, None], used[None]), pairs)
    return found


def _pairs_within(begin: np.ndarray, length: np.ndarray, number: np.ndarray, sets: int, windows: Windows) -> np.ndarray:
    """Pairs of the queries of each piece of one document with the keys of each set, float64 `[P, S]`.

    `begin` int64 `[P]`, ascending from 0, is the place of each piece in the document, `number` that of its set.
    """
    mine = np.eye(sets, dtype=np.int64)[number]
    before = np.cumsum(length[:, None] * mine, axis=0) - length[:, None] * mine  # keys of a set before each piece
    inside = length[:, None] * before + (length * (length + 1) // 2)[:, None] * mine
    until = np.cumsum(inside, axis=0) - inside  # sum of the keys seen by all queries before each piece

    def seen(place: np.ndarray) -> np.ndarray:
        """Keys of each set that are seen, without a window, by all queries before `place`."""
        place = np.maximum(place, 0)
        piece = np.searchsorted(begin, place, side="right") - 1
        more = (place - begin[piece])[:, None]
        return until[piece] + more * before[piece] + more * (more + 1) // 2 * mine[piece]

    causal = inside
    total = np.zeros(causal.shape)
    for window, fraction in windows:
        # Keys that a query sees, less those that one `window` tokens before it sees.
        away = 0 if window is None else seen(begin + length - window) - seen(begin - window)
        total += fraction * (causal - away)
    return total
