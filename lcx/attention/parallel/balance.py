"""What the devices of a ring have to do for a row, exchange by exchange, by counted pairs: who waits for whom, and what is sent.

Host code in NumPy. Legend: T tokens in a row, n devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lcx.attention.parallel.dealing import deal, nested_rings, part_sizes, parts_needed
from lcx.attention.parallel.documents import CAUSAL, Documents, Pieces, Windows, pair_counts
from lcx.attention.parallel.ring import window_hops
from lcx.attention.parallel.sequence_layout import arrange
from lcx.core.batch import SequenceLayout
from lcx.core.mask import Mask

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

    def time(self, transfer: float, hidden: bool = True) -> float:
        """The time until all are done, in pairs, if what a device holds is sent in the time of `transfer` pairs.

        What a step needs is sent during the step before it, or unless it is `hidden` before the step's own work.
        """
        clock = np.zeros(len(self.steps[0].work))
        for step, following in zip(self.steps, (*self.steps[1:], Step(np.zeros(1), 1, 0.0)), strict=True):
            begin = np.repeat(clock.reshape(-1, step.ring).max(axis=1), step.ring)
            sent = transfer * (following.sent if hidden else step.sent)
            clock = begin + (np.maximum(step.work, sent) if hidden else step.work + sent)
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
    """The balance of a ring over a row that is dealt without regard to its documents; of layers with windows alone, over the
    neighbours that these reach."""
    tokens = int(documents.lengths.sum())
    pieces = _pieces(documents, arrange(np.arange(tokens)[None], layout, n)[0], n)
    pairs = pair_counts(documents, pieces, pieces.device, n, n, windows)
    sizes = [size for size, _ in windows if size is not None]
    near = window_hops(Mask(window=max(sizes)), layout, tokens // n, n) if len(sizes) == len(windows) else None
    hops = range(n) if near is None else [*range(near.before + 1), *range(n - 1, n - near.after - 1, -1)]
    device = np.arange(n)
    return Balance(tuple(Step(pairs[device, (device - hop) % n], n, float(hop > 0)) for hop in hops))


def _pieces(documents: Documents, columns: np.ndarray, n: int) -> Pieces:
    """The pieces of a row whose devices hold its tokens in this order, int `[T]`."""
    document = np.searchsorted(documents.starts, columns, side="right") - 1
    device = np.arange(len(columns)) // (len(columns) // n)
    new = (np.diff(columns) != 1) | (np.diff(document) != 0) | (np.diff(device) != 0)
    at = np.concatenate([[0], np.flatnonzero(new) + 1])
    whole = np.full(len(at), n)
    return Pieces(document[at], columns[at], np.diff(np.append(at, len(columns))), device[at], whole)


def choose_balanced(
    rows: Sequence[Documents], layout: SequenceLayout, n: int, windows: Windows = CAUSAL, transfer: float = 0.0
) -> tuple[SequenceLayout, str]:
    """`balanced`, if attention over rows like these takes n devices at least `WORSE` times as long in `layout`; else that. And why.

    `transfer`: pairs that a device computes while what it holds is sent; a ring hides that behind work, gathers need not (on TPUs
    they do not). Rows are taken one by one, kinds of layers in proportion.
    """
    ideal = sum(float(row.work(windows).sum()) for row in rows) / n
    other = ours = 0.0
    for row in rows:
        pieces = deal(row, n, windows)
        for window, fraction in windows:
            kind = ((window, 1.0),)
            other += fraction * of_layout(row, layout, n, kind).time(transfer)
            ours += fraction * of_pieces(row, pieces, n, kind).time(transfer, hidden=False)
    taken: SequenceLayout = "balanced" if other > WORSE * ours else layout
    return taken, (
        f"{taken}: attention over the documents of {len(rows)} rows takes {n} devices {other / ideal:.2f} times as long as even "
        f"work with {layout}, {ours / ideal:.2f} times with balanced"
    )
