"""What a mixture actually contains: counted from the rows that a run would train on, not from the configured weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import numpy as np

from lcx.core.batch import PADDING
from lcx.core.errors import UserError
from lcx.data.config import QUESTIONS, Upsampling
from lcx.data.loader import Loader, TextPart, unmapped
from lcx.data.sources import sources
from lcx.data.sources.documents import describe
from lcx.data.synthetic.skills import SKILLS

_SHOWN, _KEPT = 240, 16
"""Tokens of a sample; samples kept of each kind of a task's rows."""


@dataclasses.dataclass(frozen=True)
class PartReport:
    """One part: counts over the inspected rows.

    `places` is the number of token positions, `tokens` how many of them are filled (shared anchors included), `trained` how many
    have a loss weight, and `loss_weight` the sum of the weights. `documents` is the number of different documents seen,
    `documents_by_length[i]` how many have a total length in bin i, and `tokens_by_length[i]` how many tokens came from those (a
    task's row counts as one document). `pieces` are the spans of documents in rows, `cut` those that are not a whole document;
    `full_rows` have no padding, and the emptiest row has `least_tokens`. `samples` are the beginnings of a few documents, or the
    ends of a task's rows: of questions one of each skill, which is named.
    """

    name: str
    kind: str
    source: str
    rows: int
    places: int
    tokens: int
    trained: int
    loss_weight: float
    documents: int
    documents_by_length: tuple[int, ...]
    tokens_by_length: tuple[int, ...]
    pieces: int
    cut: int
    full_rows: int
    least_tokens: int
    samples: tuple[str, ...]

    @property
    def fill_ratio(self) -> float:
        """Fraction of the places that hold a token."""
        return self.tokens / max(self.places, 1)


@dataclasses.dataclass(frozen=True)
class Report:
    """All parts; bin i holds documents of `edges[i]` to `edges[i + 1] - 1` tokens, and the last bin also all longer ones."""

    seq_len: int
    edges: tuple[int, ...]
    parts: tuple[PartReport, ...]

    @property
    def fill_ratio(self) -> float:
        """Fraction of all places that hold a token."""
        return sum(part.tokens for part in self.parts) / max(sum(part.places for part in self.parts), 1)

    def token_shares(self) -> dict[str, float]:
        """Share of all tokens by part."""
        total = sum(part.tokens for part in self.parts)
        return {part.name: part.tokens / max(total, 1) for part in self.parts}

    def bins(self) -> list[str]:
        """Names of the length bins."""
        bounds = zip(self.edges[:-1], self.edges[1:], strict=True)
        return [f"{low:,}-{high - 1:,}" for low, high in bounds][:-1] + [f"{self.edges[-2]:,}+"]

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text per part for a table with the columns of `COLUMNS`."""
        shares = self.token_shares()
        return [
            (
                part.name,
                part.kind,
                part.source,
                f"{part.rows:,}",
                f"{part.tokens:,}",
                f"{shares[part.name]:.1%}",
                f"{part.fill_ratio:.2%}",
                f"{part.documents:,}",
                f"{part.trained / max(part.tokens, 1):.1%}",
                f"{part.loss_weight / max(part.trained, 1):.2f}",
            )
            for part in self.parts
        ]

    def documents_by_length(self) -> list[tuple[str, ...]]:
        """One row of text per length bin: the bin, then the documents of each part."""
        counts = zip(*(part.documents_by_length for part in self.parts), strict=True)
        return [(name, *(f"{count:,}" for count in row)) for name, row in zip(self.bins(), counts, strict=True)]

    def shares_by_length(self) -> list[tuple[str, ...]]:
        """One row of text per length bin: the bin, each part's share of all documents' tokens, and their sum."""
        total = max(sum(sum(part.tokens_by_length) for part in self.parts), 1)
        counts = zip(*(part.tokens_by_length for part in self.parts), strict=True)
        return [
            (name, *(f"{count / total:.1%}" for count in row), f"{sum(row) / total:.1%}")
            for name, row in zip(self.bins(), counts, strict=True)
        ]


COLUMNS = ("part", "kind", "source", "rows", "tokens", "share", "filled", "documents", "with loss", "mean weight")


@dataclasses.dataclass(frozen=True)
class UpsamplingShare:
    """What one way of length upsampling makes of one part of text, or of all of them (`part` is `all text`).

    `tokens` is the part's share of all text. Of the documents and tokens that are read, `long_documents` and `long_tokens` are the
    shares of documents of at least `short_tokens` tokens.
    """

    how: Upsampling
    part: str
    tokens: float
    long_documents: float
    long_tokens: float


UPSAMPLING_COLUMNS = ("length upsampling", "part", "share of text", "long documents", "tokens in long documents")


def compare_upsampling(loader: Loader) -> list[UpsamplingShare]:
    """The mix under each way of length upsampling, computed from the lengths of the documents that each would leave.

    A part's share of tokens is its share of rows, which holds where rows are full. Empty without parts of text.
    """
    texts = {i: part for i, part in enumerate(map(unmapped, loader.parts)) if isinstance(part, TextPart)}
    found = []
    for how in get_args(Upsampling) if texts else ():
        weights = loader.weights(how)[list(texts)]
        shares = weights / weights.sum()
        read = [(part.whole if how == "none" else part.thinned, part.config.short_tokens) for part in texts.values()]
        counts = np.stack([_counts(*chosen) for chosen in read])
        # A part is read in proportion to its share, so its documents come at the rate share / tokens.
        rates = counts * (shares / counts[:, 1])[:, None]
        names = [loader.names[i] for i in texts]
        for name, row in [*zip(names, rates, strict=True), *([("all text", rates.sum(0))] if len(names) > 1 else [])]:
            documents, tokens, long_documents, long_tokens = row.tolist()
            found.append(UpsamplingShare(how, name, tokens, long_documents / documents, long_tokens / tokens))
    return found


def shares_over_stage(loader: Loader) -> list[tuple[int, int, np.ndarray]]:
    """First and last step of each tenth of a stage, from 1, and the shares of rows by part, float64 `[P]`.

    Empty where weights do not change.
    """
    if loader.schedule is None:
        return []
    steps, found = loader.schedule.steps, []
    for i in range(min(10, steps)):
        first, stop = i * steps // min(10, steps), (i + 1) * steps // min(10, steps)
        parts = np.concatenate([loader.addresses(step)[0] for step in range(first, stop)])
        found.append((first + 1, stop, np.bincount(parts, minlength=len(loader.names)) / len(parts)))
    return found


def spread_steps(loader: Loader, count: int) -> Sequence[int]:
    """The first `count` steps, or as many (at most all) over the stage of a schedule, each from the middle of its stretch."""
    if loader.schedule is None:
        return range(count)
    total = loader.schedule.steps
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _counts(source: sources.Subset, long: int) -> np.ndarray:
    """Documents, their tokens, documents of at least `long` tokens and the tokens of those, float64 `[4]`."""
    above = source.lengths[source.lengths >= long]
    return np.asarray([len(source.lengths), source.num_tokens, len(above), above.sum()], np.float64)


def inspect(loader: Loader, rows: int, samples: int = 3) -> Report:
    """Counts over the first `rows` rows of a loader's mixture (rounded up to whole steps).

    Where weights change within the stage, over rows of whole steps that are evenly spread over it. Raises `UserError` if `rows` is
    below 1.
    """
    if rows < 1:
        raise UserError(f"rows={rows} must be at least 1")
    texts = [part for part in map(unmapped, loader.parts) if isinstance(part, TextPart)]
    longest = max([loader.seq_len, *(int(part.source.lengths.max()) for part in texts)])
    edges = (1, *(1 << power for power in range(6, max(longest.bit_length(), 6) + 1)))
    tallies = [_Tally(loader, index, edges) for index in range(len(loader.parts))]
    for step in spread_steps(loader, -(-rows // loader.num_rows)):
        part, row = loader.addresses(step)
        batch = loader.batch(step)
        for index in np.unique(part):
            own = part == index
            tallies[index].add(row[own], batch.segments[own], batch.loss_weights[own], batch.tokens[own])
    return Report(loader.seq_len, edges, tuple(tally.report(samples) for tally in tallies))


class _Tally:
    """Running counts of one part."""

    def __init__(self, loader: Loader, index: int, edges: tuple[int, ...]) -> None:
        self._loader, self._name, self._part, self._edges = loader, loader.names[index], unmapped(loader.parts[index]), edges
        self._rows = self._tokens = self._trained = self._pieces = self._cut = self._full = 0
        self._least = loader.seq_len
        self._loss_weight = 0.0
        self._by_document: dict[int, int] = {}
        self._ends: dict[str, list[str]] = {}

    def add(self, rows: np.ndarray, segments: np.ndarray, weights: np.ndarray, tokens: np.ndarray) -> None:
        self._rows += len(rows)
        filled = (segments != PADDING).sum(axis=1)
        self._tokens += int(filled.sum())
        self._full += int((filled == segments.shape[1]).sum())
        self._least = min(self._least, int(filled.min()))
        self._trained += int((weights > 0).sum())
        self._loss_weight += float(weights.sum(dtype=np.float64))
        if not isinstance(self._part, TextPart) and self._wants_samples():
            for skill, content in zip(self._part.skills(rows), tokens, strict=True):
                ends = self._ends.setdefault(skill, [])
                if len(ends) < _KEPT:
                    ends.append(self._loader.corpus.tokenizer.decode(content[-_SHOWN:]))
        for row, content in zip(rows.tolist(), tokens, strict=True):
            if isinstance(self._part, TextPart):
                for document, start, end in self._part.plan.spans(row):
                    self._by_document[document] = self._by_document.get(document, 0) + end - start
                    self._pieces += 1
                    self._cut += end - start < int(self._part.source.lengths[document])
            else:
                self._by_document[row] = len(content)
                self._pieces += 1

    def _wants_samples(self) -> bool:
        """Whether a skill of questions has not been seen; as its rows are composed again for that, it is asked only so long."""
        if self._part.config.kind == QUESTIONS:
            return len(self._ends) < len(self._part.config.questions.skills or SKILLS)
        return sum(map(len, self._ends.values())) < _KEPT

    def report(self, samples: int) -> PartReport:
        documents, part = np.fromiter(self._by_document, np.int64, len(self._by_document)), self._part
        taken = np.fromiter(self._by_document.values(), np.int64, len(documents))
        lengths = part.source.lengths[documents] if isinstance(part, TextPart) else taken
        bins = np.clip(np.searchsorted(self._edges, lengths, "right") - 1, 0, len(self._edges) - 2)
        by_length = np.bincount(bins, minlength=len(self._edges) - 1)
        tokens_by_length = np.bincount(bins, weights=taken, minlength=len(self._edges) - 1).astype(np.int64)
        if isinstance(part, TextPart):
            shown = [self._opening(i) for i in documents[:samples].tolist()]
        elif part.config.kind == QUESTIONS:
            shown = [f"{skill}: {end}" for skill, ends in sorted(self._ends.items()) for end in ends[: min(samples, 1)]]
        else:
            shown = [end for ends in self._ends.values() for end in ends[:samples]]
        return PartReport(
            name=self._name,
            kind=part.config.kind,
            source=describe(part.config.source),
            rows=self._rows,
            places=self._rows * self._loader.seq_len,
            tokens=self._tokens,
            trained=self._trained,
            loss_weight=self._loss_weight,
            documents=len(documents),
            documents_by_length=tuple(by_length.tolist()),
            tokens_by_length=tuple(tokens_by_length.tolist()),
            pieces=self._pieces,
            cut=self._cut,
            full_rows=self._full,
            least_tokens=self._least,
            samples=tuple(shown),
        )

    def _opening(self, document: int) -> str:
        source = self._part.source
        end = min(int(source.lengths[document]), _SHOWN)
        tokens = source.gather(np.array([document]), np.array([0]), np.array([end]))
        return f"{source.name(document)}: {self._loader.corpus.tokenizer.decode(tokens)}"
