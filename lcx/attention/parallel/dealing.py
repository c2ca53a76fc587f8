"""Deals the documents of a packed row to devices so that all of them work equally much, and few keys have to travel.

A document lies whole on one device where that can be, else in equal shares on the devices of a small ring, else on all: rings of a
few devices are nested in the whole one (`nested_rings`). A share is cut into stripes, dealt back and forth, so that the devices
have equal work with any part of the document's keys. Short documents fill what is left, cut where they have to be.

Work is counted in query-key pairs that masks show. Host code in NumPy. Legend: T tokens in a row, n devices, D documents.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lcx.attention.parallel.documents import CAUSAL, Documents, Pieces, Windows
from lcx.core.batch import PADDING, SHARED

TOLERANCE = 0.02
"""Work by which the parts of a ring may differ from their mean when documents are placed whole, as a fraction of it."""

FILLING = 0.02
"""Fraction of a ring's tokens that is kept back, in the shortest documents, to fill what is left."""

PLACED = 24
"""Documents that are placed one by one for each part of a ring; of more, the shorter ones are kept back, too."""

STRIPES, STRIPE = 16, 16
"""Most stripes of a document on a device, and tokens from which there are more than two."""

SHARE = 32
"""Tokens of a cut document on a device from which it is shared by more devices."""


def nested_rings(n: int) -> tuple[int, ...]:
    """Sizes of the rings among n devices, the smallest first: each divides the next one, and the last is n."""
    inner = next((size for size in range(2, n) if n % size == 0 and size**2 >= n), n)
    return () if n == 1 else (n,) if inner == n else (inner, n)


def part_sizes(tokens: int, n: int) -> tuple[int, ...]:
    """Tokens of the parts in which the keys of a device that has `tokens` are gathered in each of `nested_rings`.

    Parts of all devices of a ring are together as many tokens, for every ring, as a device has, filled up to a multiple of n.
    """
    return tuple(-(-tokens // n) * n // size for size in nested_rings(n))


def deal(documents: Documents, n: int, windows: Windows = CAUSAL) -> Pieces:
    """The pieces of a row that each of n devices gets, T / n tokens in all; the same whenever it is asked for.

    On every device keys that are needed around the whole ring lie first, and those that are needed around an inner one last.
    """
    tokens, left = divmod(int(documents.lengths.sum()), n)
    if left:
        raise ValueError(f"{tokens * n + left} tokens cannot be dealt to {n} devices")
    shares = _Shares(documents, n, windows)
    shares.deal(shares.by_work(np.arange(len(documents.lengths))), 0, n, len(shares.rings))
    pieces = shares.pieces()
    sent = sum(count * (size - 1) / size for count, size in zip(parts_needed(pieces, n), shares.rings, strict=True))
    if sent <= n - 1:
        return pieces
    # Parts of both kinds overlap so much that everything is better sent once.
    return dataclasses.replace(pieces, reach=np.where(pieces.reach > 1, n, pieces.reach))


def parts_needed(pieces: Pieces, n: int) -> tuple[int, ...]:
    """How many parts (`part_sizes`) of every device's keys go around each of `nested_rings`: those of the device with most."""
    tokens, found = int(pieces.length.sum()) // n, []
    begin = np.cumsum(pieces.length) - pieces.length - pieces.device * tokens
    for size, part in zip(nested_rings(n), part_sizes(tokens, n), strict=True):
        there = pieces.reach == size
        ends = begin[there] + pieces.length[there] if size == n else part * size - begin[there]
        found.append(-(-int(ends.max(initial=0)) // part))
    return tuple(found)


class _Shares:
    """What of each document lies on which device, filled in from the whole ring down to single devices."""

    def __init__(self, documents: Documents, n: int, windows: Windows) -> None:
        self.documents, self.n, self.rings = documents, n, nested_rings(n)
        self.lengths, self.work = documents.lengths, documents.work(windows)
        self.window = min((size for size, _ in windows if size is not None), default=None)
        self.free = np.full(n, self.lengths.sum() // n)
        """Tokens that each device has yet to get, int64 `[n]`."""
        self.need = np.full(n, self.work.sum() / n)
        """Work that each device has yet to get, float64 `[n]`."""
        self.tolerance = TOLERANCE * self.work.sum() / n
        self.home = np.full(len(self.lengths), -1)
        """Device of the documents that lie whole on one, int64 `[D]`."""
        self.spread: dict[int, np.ndarray] = {}
        """Tokens of the others on each device, int64 `[n]`."""
        self.cut: set[int] = set()
        """Those of them whose shares are not equal."""

    def by_work(self, documents: np.ndarray) -> np.ndarray:
        """Documents, those with the most work first."""
        return documents[np.argsort(-self.work[documents], kind="stable")]

    def deal(self, documents: np.ndarray, first: int, stop: int, level: int) -> None:
        """Deals documents, sorted by work, of as many tokens as devices `first` to `stop - 1` have free."""
        if level == 0:
            self.home[documents] = first
            return
        size = self.rings[level - 2] if level > 1 else 1
        parts = [slice(at, at + size) for at in range(first, stop, size)]
        equal, placed, filling = self._choose(documents, parts)
        for d in equal:
            self._lay(d, slice(first, stop), _shared(int(self.lengths[d]), np.ones(stop - first), self.free[first:stop]))
        for part, own in zip(parts, placed, strict=True):
            while self.free[part].sum() < self.lengths[own].sum():
                filling.append(own.pop(int(np.argmin(self.lengths[own]))))
        self._fill(filling, parts, placed)
        for part, own in zip(parts, placed, strict=True):
            self.deal(self.by_work(np.asarray(own, np.int64)), part.start, part.stop, level - 1)

    def _choose(self, documents: np.ndarray, parts: list[slice]) -> tuple[list[int], list[list[int]], list[int]]:
        """Documents to spread equally over all parts, as few as leave the others' work in balance; those of each part; the rest."""
        free = np.asarray([self.free[part].sum() for part in parts])
        need = np.asarray([self.need[part].sum() for part in parts])
        tolerance = self.tolerance * (parts[0].stop - parts[0].start)
        large = (self.lengths[documents] > free.max()) | (self.work[documents] > need.max() + tolerance)
        count = fewest = int(np.sum(large))
        while True:
            error, equal, placed, filling = self._place(documents, count, free.astype(float), need.copy(), tolerance)
            if error <= tolerance or count == len(documents):
                return equal, placed, filling
            count = min(len(documents), count + max(1, (count - fewest) // 2))

    def _place(
        self, documents: np.ndarray, count: int, free: np.ndarray, need: np.ndarray, tolerance: float
    ) -> tuple[float, list[int], list[list[int]], list[int]]:
        """(largest error, spread equally, placed in each part, kept back) if the first `count` documents are spread equally.

        The others go, the densest first, where most work is needed, as long as there is room, and as what is then left there can
        still be filled with the documents that are kept back.
        """
        equal, others = documents[:count].tolist(), documents[count:]
        size = len(free)
        free -= self.lengths[equal].sum() / size
        need -= self.work[equal].sum() / size
        left = np.cumsum(self.lengths[others][::-1])[::-1]
        most = min(PLACED * size, int(np.sum(left > FILLING * (free.sum() + self.lengths[equal].sum()))))
        filling = others[most:]
        thin = self.work[filling].sum() / max(1, self.lengths[filling].sum())
        placed: list[list[int]] = [[] for _ in range(size)]
        room, rest = free.tolist(), need.tolist()
        for d in others[:most].tolist():
            length, work = int(self.lengths[d]), float(self.work[d])
            for part in sorted(range(size), key=lambda part: -rest[part]):
                if room[part] >= length and rest[part] - work >= thin * (room[part] - length) - tolerance / 2:
                    room[part] -= length
                    rest[part] -= work
                    placed[part].append(d)
                    break
            else:
                equal.append(d)
                room, rest = [x - length / size for x in room], [x - work / size for x in rest]
        error = max(abs(work - thin * tokens) for work, tokens in zip(rest, room, strict=True))
        return (math.inf if min(room) < -0.5 else error), equal, placed, filling.tolist()

    def _fill(self, filling: list[int], parts: list[slice], placed: list[list[int]]) -> None:
        """Documents one after another where tokens are missing, the lengths mixed; they are cut where a part is full."""
        documents = np.asarray(filling, np.int64)
        documents = documents[np.argsort(np.arange(len(documents)) * (math.sqrt(5) - 1) / 2 % 1.0, kind="stable")]
        bounds = np.cumsum([self.free[part].sum() - self.lengths[own].sum() for part, own in zip(parts, placed, strict=True)])
        ends = np.cumsum(self.lengths[documents])
        begins = ends - self.lengths[documents]
        first, last = np.searchsorted(bounds, begins, "right"), np.searchsorted(bounds, ends - 1, "right")
        for d, begin, end, one, other in zip(*(x.tolist() for x in (documents, begins, ends, first, last)), strict=True):
            if one == other:
                placed[one].append(d)
                continue
            self.cut.add(d)
            for number in range(one, other + 1):
                below = int(bounds[number - 1]) if number else 0
                tokens = min(end, int(bounds[number])) - max(begin, below)
                if tokens:
                    self._lay(d, parts[number], self._few(tokens, self.free[parts[number]]))

    def _few(self, tokens: int, free: np.ndarray) -> np.ndarray:
        """Shares of a cut document on devices, on as many as get enough of it: those with the most room."""
        count = min(len(free), max(1, tokens // SHARE))
        return _shared(tokens, np.isin(np.arange(len(free)), np.argsort(-free, kind="stable")[:count]).astype(float), free)

    def _lay(self, d: int, devices: slice, tokens: np.ndarray) -> None:
        self.spread.setdefault(d, np.zeros(self.n, np.int64))[devices] += tokens
        self.free[devices] -= tokens
        self.need[devices] -= tokens * (self.work[d] / self.lengths[d])

    def pieces(self) -> Pieces:
        """All pieces; documents in equal shares lie outermost, so that their parts are the same on all devices."""
        starts, whole = self.documents.starts, np.flatnonzero(self.home >= 0)
        reach = np.where(self.documents.shared[whole], self.n, 1)
        rows = [np.stack([whole, starts[whole], self.lengths[whole], self.home[whole], reach, np.where(reach > 1, 1, 2)])]
        for d, tokens in self.spread.items():
            devices, length, start = _stripes(tokens, self.window)
            ends = int(devices.min()), int(devices.max())
            size = next(size for size in (1, *self.rings) if ends[0] // size == ends[1] // size)
            if self.documents.segments[d] in (PADDING, SHARED):
                size = 1 if self.documents.segments[d] == PADDING else self.n
            # Around the whole ring, in equal shares and cut; on one device; around an inner ring, cut and in equal shares.
            place = {self.n: 0 + (d in self.cut), 1: 2}.get(size, 4 - (d in self.cut))
            rows.append(np.stack([*np.broadcast_arrays(d, starts[d] + start, length, devices, size, place)]))
        found = np.concatenate(rows, axis=1)
        _, start, _, device, _, place = found
        return Pieces(*found[:-1, np.lexsort((start, place, device))])


def _shared(total: int, weights: np.ndarray, room: np.ndarray) -> np.ndarray:
    """`total` in whole numbers, in proportion to weights as far as there is room; int64."""
    exact = total * weights / weights.sum()
    found = np.floor(exact).astype(np.int64)
    found[np.lexsort((-room, found - exact))[: total - int(found.sum())]] += 1
    over = np.maximum(found - room, 0)
    if not over.any():
        return found
    found -= over
    return found + _shared(int(over.sum()), (room - found).astype(float), room - found)


def _stripes(tokens: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(device, length, start in the document) of the stripes of a document with so many tokens on each device, all int64.

    With a window one stripe of every device is at most half as long as it.
    """
    devices = np.flatnonzero(tokens)
    own = tokens[devices]
    most = STRIPES if window is None else max(STRIPES, 2 * int(own.sum()) // window)
    rounds = int(np.clip(own.max() // STRIPE // 2 * 2, 2, most // 2 * 2))
    length = np.diff(own * np.arange(rounds + 1)[:, None] // rounds, axis=0)
    who = np.broadcast_to(devices, length.shape).copy()
    length[1::2], who[1::2] = length[1::2, ::-1], who[1::2, ::-1]
    length, who = length.reshape(-1), who.reshape(-1)
    start, there = np.cumsum(length) - length, length > 0
    return who[there], length[there], start[there]
