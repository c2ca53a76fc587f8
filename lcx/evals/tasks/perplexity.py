"""Perplexity by length and loss by position on held-out text.

How lengths are made comparable: `spans` of the longest length are drawn once. At length T every span is covered by windows of
T tokens that move on by the stride, and each of its tokens counts once, in the window that shows it the most context. So every
length scores the same tokens, and only the context differs: on average T/2 tokens with a stride of T, at least T - stride with
a smaller one. The *final* number looks at each span's last tokens alone, seen with exactly the T tokens that end there.

Legend: R spans or windows, T tokens in a window.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import numpy as np

from lcx.core.errors import UserError
from lcx.data.sources.sources import Subset
from lcx.data.tokenizers.tokenizers import Bytes, Tokenizer
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Backend, Item, Materials, Task, digest
from lcx.evals.results import Measurement


@dataclasses.dataclass(frozen=True)
class Perplexity(Task):
    """Losses in nats per token of `text` (spans int32 `[R, longest + 1]`): `nll`, `final_nll` and `bits_per_byte` at each length,
    and `nll_by_position` at the longest.

    `stride` is how far windows move on (None: the window itself; cut to the window where longer); `final` how many tokens at a
    span's end make the final number.
    """

    name = "perplexity"
    text: np.ndarray
    final: int
    stride: int | None = None
    bytes_per_token: float = 1.0
    notes: tuple[str, ...] = ()

    @classmethod
    def build(cls, materials: Materials) -> Self | None:
        """Spans of the mixture's first text part, or of the one that `evals.text` names."""
        config = materials.config
        if not config.perplexity_tokens:
            return None
        longest, shortest = max(config.lengths), min(config.lengths)
        documents = materials.heldout(materials.part(config.text, "text", is_task=False).source)
        text, joined = spans(documents, longest, max(1, config.perplexity_tokens // longest), config.seed)
        final = max(1, shortest // 2) if config.final_tokens is None else min(config.final_tokens, shortest)
        notes = ("Held-out documents were joined, since none is that long.",) if joined else ()
        return cls(text, final, config.stride, bytes_per_token(text, materials.tokenizer), notes)

    def count(self, zero_shot: bool) -> int:
        """All spans, under every scheme."""
        return len(self.text)

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """The losses with contexts of up to `length` tokens."""
        longest = self.text.shape[1] - 1
        if length > longest:
            raise UserError(f"evals.lengths={length} must not exceed the spans' {longest} tokens")
        windows = cover(longest, length, length if self.stride is None else min(self.stride, length))
        rows = (row for start, _ in windows for row in self.text[:count, start : start + length + 1])
        scores = backend.loglikelihood([Item(row[:1], row[1:]) for row in rows])
        nll = np.stack([score.nll for score in scores]).astype(np.float64).reshape(len(windows), count, length)
        counted = np.concatenate([nll[i, :, first:] for i, (_, first) in enumerate(windows)], axis=1)
        mean, size = float(counted.mean()), int(counted.size)
        found = [
            ("nll", counted),
            ("final_nll", nll[-1, :, length - self.final :]),
        ]
        named = digest(*self.text[:count])
        made = [
            Measurement(
                self.name, metric, length, float(losses.mean()), int(losses.size),
                scores=tuple(round(float(mean), 6) for mean in losses.mean(axis=1)), digest=named,
            )
            for metric, losses in found
        ]  # fmt: skip
        made.append(Measurement(self.name, "bits_per_byte", length, mean / math.log(2) / self.bytes_per_token, size))
        return made + (loss_by_position(nll.reshape(-1, length)) if length == longest else [])


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
