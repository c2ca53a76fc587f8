"""Perplexity by length and loss by position on held-out text.

How lengths are made comparable: `spans` of the longest length are drawn once. At length T every span is covered by windows of
T tokens that move on by the stride, and each of its tokens counts once, in the window that shows it the most context. So every
length scores the same tokens, and only the context differs: on average T/2 tokens with a stride of T, at least T - stride with
a smaller one. The *final* number looks at each span's last tokens alone, seen with exactly the T tokens that end there.

Legend: R spans or windows, T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcx.core.errors import UserError
from lcx.data.sources.sources import Subset
from lcx.data.tokenizers.tokenizers import Bytes, Tokenizer
from lcx.evals.results import PerplexityCurve, PerplexityPoint, PositionLoss
from lcx.evals.scoring import ScorerFor, score_rows


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


def perplexity(
    scorer_for: ScorerFor,
    text: np.ndarray,
    lengths: Sequence[int],
    *,
    stride: int | None = None,
    final: int | None = None,
    tokens_per_forward: int = 1 << 14,
    bytes_per_token: float = 1.0,
    scheme: str = "none",
    trained: int | None = None,
    joined: bool = False,
) -> PerplexityCurve:
    """Perplexity of `text` (spans int32 `[R, longest + 1]`) at each of `lengths`, and loss by position at the longest.

    `stride` is how far windows move on (None: the window itself; cut to the window where longer); `final` how many tokens at a
    span's end make the final number (None: half the shortest length). Losses in nats.
    """
    longest = text.shape[1] - 1
    if not lengths or max(lengths) > longest:
        raise UserError(f"evals.lengths={tuple(lengths)} must not exceed the spans' {longest} tokens")
    final = max(1, min(lengths) // 2) if final is None else min(final, *lengths)
    points, by_position = [], None
    for length in sorted(lengths):
        step = length if stride is None else min(stride, length)
        windows = cover(longest, length, step)
        rows = np.concatenate([text[:, start : start + length + 1] for start, _ in windows])
        nll = score_rows(scorer_for(length), rows, tokens_per_forward).nll
        nll = nll.astype(np.float64).reshape(len(windows), len(text), length)
        counted = np.concatenate([nll[i, :, first:] for i, (_, first) in enumerate(windows)], axis=1)
        points.append(
            PerplexityPoint(
                length=int(length), stride=int(step), tokens=int(counted.size), nll=float(counted.mean()),
                final_tokens=len(text) * final, final_nll=float(nll[-1, :, length - final :].mean()),
            )
        )  # fmt: skip
        by_position = loss_by_position(nll[:, :, :].reshape(-1, length))
    return PerplexityCurve(tuple(points), by_position, bytes_per_token, scheme, trained, joined)


def loss_by_position(nll: np.ndarray, per_octave: int = 2) -> PositionLoss:
    """Means of losses `[R, T]` over positions in bins: the first four positions, then `per_octave` to each doubling."""
    length = nll.shape[1]
    octaves = np.arange(0, np.log2(max(length, 4)) - 2, 1 / per_octave)
    edges = np.unique([0, *np.round(4 * 2.0**octaves).astype(int), length])
    edges = edges[edges <= length]
    means = [float(nll[:, a:b].mean()) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return PositionLoss(length, tuple(map(int, edges)), tuple(means), tuple(int(x) * len(nll) for x in np.diff(edges)))


def bytes_per_token(text: np.ndarray, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes that a token of `text` stands for, on average."""
    if isinstance(tokenizer, Bytes):
        return 1.0
    return sum(len(tokenizer.decode(row).encode()) for row in text) / text.size
