"""What the devices of a ring have to do for a row, exchange by exchange, by counted pairs: who waits for whom, and what is sent.

Host code in NumPy. Legend: T tokens in a row, n devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lcx.attention.parallel.dealing import deal, nested_rings, part_sizes, parts_needed
from lcx.attention.parallel.documents import CAUSAL, Documents, Pieces, Windows, pair_counts
from lcx.attention.parallel.sequence_layout import arrange
from lcx.core.batch import SequenceLayout

WORSE = 1.05
"""How much longer than with `balanced` the devices may work with another layout before `auto` takes `balanced`."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The work of each device with the keys that one exchange brought, pairs float64 `[n]`. The exchange was among the devices of
    rings of `ring` devices; `sent` is what each received, as a fraction of what a device holds."""

    work: np.ndarray
    ring: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Balance:
    """A forward pass over a row: steps in order, the first with the keys that each device has from the beginning."""

    steps: tuple[Step, ...]

    @property
    def work(self) -> np.ndarray:
        """Pairs of each device, float64 `[n]`."""
        return np.sum([step.work for step in self.steps], axis=0)

    @property
    def busiest(self) -> float:
        """The most work of a device over the mean."""
        return float(self.work.max() / self.work.mean())

    @property
    def longest(self) -> float:
        """The time until all are done over that of the mean work, if transfers take none: in every step a device waits for the
        slowest of its ring."""
        return self.time(0.0) / float(self.work.mean())

    @property
    def sent(self) -> float:
        """What each device receives, in multiples of what it holds; n - 1 in a plain ring."""
        return sum(step.sent for step in self.steps)

    def time(self, transfer: float) -> float:
        """The time until all are done, in pairs, if what a device holds is sent in the time of `transfer` pairs.

        What a step needs is sent during the step before it.
        """
        clock = np.zeros(len(self.steps[0].work))
        for step, following in zip(self.steps, (*self.steps[1:], Step(np.zeros(1), 1, 0.0)), strict=True):
            begin = clock.reshape(-1, step.ring).max(axis=1)
            clock = np.repeat(begin, step.ring) + np.maximum(step.work, following.sent * transfer)
        return float(clock.max())


def of_pieces(documents: Documents, pieces: Pieces, n: int, windows: Windows = CAUSAL) -> Balance:
    """The balance of a row that is dealt by its documents, with keys gathered part by part in nested rings."""
    if n == 1:
        return Balance((Step(np.asarray([documents.work(windows).sum()]), 1, 0.0),))
    rings, needed = nested_rings(n), parts_needed(pieces, n)
    parts = part_sizes(int(documents.lengths.sum()) // n, n)
    pieces, number = pieces.cut(parts[-1])
    inner = sum(needed[:-1])
    from_end = (n - 1 - number) // (n // rings[0])
    step = np.where(pieces.reach == n, 1 + inner + number, np.where(pieces.reach > 1, 1 + from_end, 0))
    sizes = (1, *[rings[0]] * inner, *[n] * needed[-1])
    work = pair_counts(documents, pieces, step, len(sizes), n, windows).T
    return Balance(tuple(Step(pairs, size, (size - 1) / size) for pairs, size in zip(work, sizes, strict=True)))


def of_layout(documents: Documents, layout: SequenceLayout, n: int, windows: Windows = CAUSAL) -> Balance:
    """The balance of a plain ring over a row that is dealt without regard to its documents."""
    pieces = _pieces(documents, arrange(np.arange(int(documents.lengths.sum()))[None], layout, n)[0], n)
    pairs = pair_counts(documents, pieces, pieces.device, n, n, windows)
    device = np.arange(n)
    return Balance(tuple(Step(pairs[device, (device - hop) % n], n, float(hop > 0)) for hop in range(n)))


def _pieces(documents: Documents, columns: np.ndarray, n: int) -> Pieces:
    """The pieces of a row whose devices hold its tokens in this order, int `[T]`."""
    document = np.searchsorted(documents.starts, columns, side="right") - 1
    device = np.arange(len(columns)) // (len(columns) // n)
    new = (np.diff(columns) != 1) | (np.diff(document) != 0) | (np.diff(device) != 0)
    at = np.concatenate([[0], np.flatnonzero(new) + 1])
    whole = np.full(len(at), n)
    return Pieces(document[at], columns[at], np.diff(np.append(at, len(columns))), device[at], whole)


def choose_balanced(
    rows: Sequence[Documents], layout: SequenceLayout, n: int, windows: Windows = CAUSAL
) -> tuple[SequenceLayout, str]:
    """`balanced`, if rows like these take the devices at least `WORSE` times as long in `layout`; else that. And why.

    All rows count together: a step takes as long as the devices need for the rows of a batch.
    """
    work = sum(float(row.work(windows).sum()) for row in rows)
    other = sum(of_layout(row, layout, n, windows).time(0.0) for row in rows) * n / work
    ours = sum(of_pieces(row, deal(row, n, windows), n, windows).time(0.0) for row in rows) * n / work
    taken: SequenceLayout = "balanced" if other > WORSE * ours else layout
    return taken, (
        f"{taken}: by the documents of {len(rows)} rows the slowest of {n} devices take {other:.2f} times the mean's time with "
        f"{layout}, {ours:.2f} times with balanced"
    )
