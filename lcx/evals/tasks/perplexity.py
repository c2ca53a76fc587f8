"""Perplexity by length and loss by position on held-out text.

How lengths are made comparable: `spans` of the longest length are drawn once. At length T every span is covered by windows of
T tokens that move on by the stride, and each of its tokens counts once, in the window that shows it the most context. So every
length scores the same tokens, and only the context differs: on average T/2 tokens with a stride of T, at least T - stride with
a smaller one. The *final* number looks at each span's last tokens alone, seen with exactly the T tokens that end there.

Legend: R spans or windows, T tokens in a window.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Self

import numpy as np

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.sources.sources import Subset
from lcx.data.tokenizers.tokenizers import Bytes, Tokenizer
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Backend, Item, Materials, Task, digest
from lcx.evals.results import Measurement


@dataclasses.dataclass(frozen=True)
class Spans:
    """Text whose tokens all lengths score: int32 `[R, longest + 1]`.

    `stride` is how far windows move on (None: the window itself; cut to the window where longer).
    """

    text: np.ndarray
    stride: int | None = None
    bytes_per_token: float = 1.0
    notes: tuple[str, ...] = ()
    known: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Losses that a task has asked for, for others to use."""

    @classmethod
    def of(cls, materials: Materials, source: SourceConfig) -> Self:
        """Spans of a source's held-out documents; the same ones, with their losses, for all tasks of an evaluation."""
        config, longest = materials.config, max(materials.config.lengths)
        named = configs.fingerprint(source)
        if named not in materials.spans:
            documents = materials.heldout(source)
            text, joined = spans(documents, longest, max(1, config.perplexity_tokens // longest), config.seed)
            notes = ("Held-out documents were joined, since none is that long.",) if joined else ()
            materials.spans[named] = cls(text, config.stride, bytes_per_token(text, materials.tokenizer), notes)
        return materials.spans[named]

    @property
    def longest(self) -> int:
        """Tokens that a span predicts."""
        return self.text.shape[1] - 1

    @functools.cached_property
    def digest(self) -> str:
        """What tells the text from another."""
        return digest(*self.text)

    def named(self, length: int) -> str:
        """What tells the losses at a length from those of other text, and of windows that move on by another stride."""
        usual = self.stride is None or self.windows(length) == cover(self.longest, length, length)
        return self.digest if usual else f"{self.digest} {self.stride}"

    def windows(self, length: int) -> list[tuple[int, int]]:
        """The windows of `cover` for a length; raises `UserError` if it is longer than the spans."""
        if length > self.longest:
            raise UserError(f"evals.lengths={length} must not exceed the spans' {self.longest} tokens")
        return cover(self.longest, length, length if self.stride is None else min(self.stride, length))

    def window_losses(self, backend: Backend, length: int) -> np.ndarray:
        """Losses float64 `[windows, R, length]` of all predictions in all windows of a length."""
        named = (backend.fingerprint, length)
        if named not in self.known:
            windows = self.windows(length)
            rows = (row for start, _ in windows for row in self.text[:, start : start + length + 1])
            scores = backend.loglikelihood([Item(row[:1], row[1:]) for row in rows])
            self.known[named] = np.stack([score.nll for score in scores]).reshape(len(windows), len(self.text), length)
        return self.known[named].astype(np.float64)

    def losses(self, backend: Backend, length: int) -> np.ndarray:
        """The loss float64 `[R, longest]` of every token of the spans once, seen with the most context of up to `length` tokens
        that a window gives it."""
        nll = self.window_losses(backend, length)
        return np.concatenate([nll[i, :, first:] for i, (_, first) in enumerate(self.windows(length))], axis=1)


def mean_loss(
    task: str, metric: str, length: int, losses: np.ndarray, named: str, counted: np.ndarray | None = None
) -> Measurement:
    """The row of losses `[R, n]`, of those alone that are `counted` (boolean, at least one): their mean, and what each span adds to
    it, times the number of spans, for pairing."""
    counted = np.ones(losses.shape, bool) if counted is None else counted
    n = int(counted.sum())
    shares = np.where(counted, losses, 0.0).sum(axis=1) * len(losses) / n
    kept = tuple(round(float(share), 6) for share in shares)
    return Measurement(task, metric, length, float(losses[counted].mean()), n, scores=kept, digest=named)


@dataclasses.dataclass(frozen=True)
class Perplexity(Task):
    """Losses in nats per token of spans: `nll`, `final_nll`, `bits_per_byte` at each length, `nll_by_position` at the longest.

    `final` is how many tokens at a span's end make the final number.
    """

    name = "perplexity"
    same_text = True
    spans: Spans
    final: int

    @classmethod
    def build(cls, materials: Materials) -> Self | None:
        """Spans of the mixture's first text part, or of the one that `evals.text` names."""
        config = materials.config
        if not config.perplexity_tokens:
            return None
        shortest = min(config.lengths)
        final = max(1, shortest // 2) if config.final_tokens is None else min(config.final_tokens, shortest)
        return cls(Spans.of(materials, materials.part(config.text, "text", is_task=False).source), final)

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the spans."""
        return self.spans.notes

    def count(self, zero_shot: bool) -> int:
        """All spans, under every scheme."""
        return len(self.spans.text)

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """The losses with contexts of up to `length` tokens."""
        nll, counted = self.spans.window_losses(backend, length), self.spans.losses(backend, length)
        made = [
            mean_loss(self.name, "nll", length, counted, self.spans.named(length)),
            mean_loss(self.name, "final_nll", length, nll[-1, :, length - self.final :], self.spans.digest),
        ]
        bits = made[0].value / math.log(2) / self.spans.bytes_per_token
        made.append(Measurement(self.name, "bits_per_byte", length, bits, made[0].n))
        return made + (loss_by_position(nll.reshape(-1, length)) if length == self.spans.longest else [])


def spans(documents: Subset, length: int, count: int, seed: int = 0) -> tuple[np.ndarray, bool]:
    """Up to `count` spans of held-out text, int32 `[R, length + 1]`, and whether documents had to be joined for them.

    Spans lie within one document and do not overlap, one from each document before a second from any; where in its document a
    span begins is random, so that a position in the window is not one in a file. Only where all documents
    together hold no such span are they joined into one stream. Raises `UserError` when even the stream is too short.
    """
    rng = np.random.default_rng([seed, length])
    fits = (documents.lengths - 1) // length
    order = rng.permutation(len(fits))
    offsets = rng.integers(0, documents.lengths - fits * length)
    picks = [(turn, document) for turn in range(int(fits.max(initial=0))) for document in order if fits[document] > turn][:count]
    if picks:
        turns, chosen = np.asarray(picks).T
        starts = offsets[chosen] + turns * length
        return documents.gather(chosen, starts, starts + length + 1).reshape(len(picks), length + 1), False
    room = (documents.num_tokens - 1) // length
    if room < 1:
        raise UserError(
            f"the held-out documents hold {documents.num_tokens:,} tokens but evals.lengths needs {length:,}; "
            "raise data.heldout_fraction, add documents, or evaluate shorter lengths"
        )
    starts = np.sort(rng.permutation(room)[:count]) * length
    return documents.windows(starts, length + 1), True


def cover(span: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Windows `(start, first counted)` of `length` tokens that cover a span, each token counted once.

    The first window counts all its tokens, later ones those that no window before them held; the last one ends with the span.
    """
    starts = [*range(0, span - length, stride), span - length]
    ends = [0, *(start + length for start in starts[:-1])]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def loss_by_position(nll: np.ndarray, per_octave: int = 2) -> list[Measurement]:
    """Means of losses `[R, T]` over positions in bins: the first four positions, then `per_octave` to each doubling."""
    length = nll.shape[1]
    octaves = np.arange(0, np.log2(max(length, 4)) - 2, 1 / per_octave)
    edges = np.unique([0, *np.round(4 * 2.0**octaves).astype(int), length])
    edges = edges[edges <= length]
    return [
        Measurement(
            "perplexity", "nll_by_position", length, float(nll[:, a:b].mean()), int(b - a) * len(nll), None, (int(a), int(b))
        )
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


def bytes_per_token(text: np.ndarray, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes that a token of `text` stands for, on average."""
    if isinstance(tokenizer, Bytes):
        return 1.0
    return sum(len(tokenizer.decode(row).encode()) for row in text) / text.size
