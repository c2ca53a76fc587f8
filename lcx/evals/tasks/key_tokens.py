"""LongPPL: perplexity of the tokens alone that take a long context to predict (Fang et al. 2024, 2410.23771).

An evaluator reads every span twice, once whole and once in windows of a short context. A token is a *key* token if the whole
context lowers its loss by more than `GAIN` nats and leaves less than `MOST`; none is among the first tokens, which a short
context holds whole. What LongCE weights a token with in training is kept for a picture.

Legend: R spans, n tokens of one span that are predicted.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Self

import numpy as np

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.data.curation.dependency import longce_weights
from lcx.data.tokenizers.stream import pieces
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.evals.answers import AnswerLog, key_of
from lcx.evals.base import Backend, Evaluator, Item, Materials, Task, digest
from lcx.evals.config import EvalConfig
from lcx.evals.results import Measurement
from lcx.evals.tasks.perplexity import Spans, mean_loss

GAIN, MOST = 2.0, 2.0
"""Nats: the least gain of a key token, and the most that is left of its loss."""

FEW = 100
"""Key tokens that a warning says are too few."""

SHORT = 4096
"""Tokens of LongPPL's short context, of which a quarter moves on at a time."""

SHOWN = 240
"""Tokens of a passage that a report draws."""


def short_context(config: EvalConfig) -> int:
    """`evals.short_context`, or else LongPPL's 4,096 tokens, at most an eighth of the longest length."""
    return config.short_context or max(4, min(SHORT, max(config.lengths) // 8))


@dataclasses.dataclass(frozen=True)
class KeyTokens(Task):
    """`nll` in nats of key tokens, `other_nll` of the rest and `key_share` at each length, the same tokens at all of them."""

    name = "long_perplexity"
    same_text = True
    spans: Spans
    tokenizer: Tokenizer
    evaluator: Evaluator
    short: int

    @classmethod
    def build(cls, materials: Materials) -> Self | None:
        """The spans that `perplexity` scores."""
        config = materials.config
        if not config.perplexity_tokens or materials.evaluator is None:
            return None
        spans = Spans.of(materials, materials.part(config.text, "text", is_task=False).source)
        short = short_context(config)
        if short >= spans.longest:
            raise UserError(f"evals.short_context={short} must be below {spans.longest}, the longest of evals.lengths")
        return cls(spans, materials.tokenizer, materials.evaluator, short)

    @property
    def notes(self) -> tuple[str, ...]:
        """Who judged."""
        judge = self.evaluator.name or "the model itself, so that models must not be compared by them"
        return (f"Key tokens gain more than {GAIN:g} nats from more than {self.short:,} tokens of context, as judged by {judge}.",)

    def count(self, zero_shot: bool) -> int:
        """All spans, under every scheme."""
        return len(self.spans.text)

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """Losses of key tokens and of others; of `key_share` alone where there are no key tokens."""
        mask = np.stack([self._mask(row, log) for row in self.spans.text])
        losses, named = self.spans.losses(backend, length), f"{self.spans.named(length)} {digest(*mask)}"
        if length == self.spans.longest and mask.sum() < FEW:
            warn(f"{self.name}: only {mask.sum():,} of {mask.size:,} tokens are key tokens; raise perplexity_tokens")
        made = [Measurement(self.name, "key_share", length, float(mask.mean()), mask.size)]
        if mask.any():
            made.insert(0, mean_loss(self.name, "nll", length, losses, named, mask))
            made.insert(1, mean_loss(self.name, "other_nll", length, losses, named, ~mask))
        return made

    def _mask(self, row: np.ndarray, log: AnswerLog) -> np.ndarray:
        """Which predicted tokens of a span are key tokens, boolean `[n]`; the evaluator is asked once, and the log keeps it."""
        length, step = self.spans.longest, max(1, self.short // 4)
        whole = self.evaluator.backend(length)
        key = key_of(self.name, self.version, self.short, whole.fingerprint, tokens=row)
        if log.known(key) is None:
            other = self.evaluator.tokenizer.fingerprint != self.tokenizer.fingerprint
            texts = pieces(self.tokenizer, row)
            read = self.evaluator.tokenizer.encode("".join(texts))[: length + 1] if other else row
            ((before, after),) = losses(self.evaluator, [read], self.short, step, length)
            found = is_key(before, after, self.short)
            gains = before - after
            if other:
                theirs = pieces(self.evaluator.tokenizer, read)
                found = carried(found, theirs[1:], texts[1:], len(theirs[0]) - len(texts[0]))
                gains = np.where(found, GAIN, 0.0)
            log.add(
                key, task=self.name, length=length, evaluator=self.evaluator.name, keys=np.flatnonzero(found).tolist(),
                passage=passage(texts[1:], gains, found),
            )  # fmt: skip
        mask = np.zeros(length, bool)
        mask[log.known(key)["keys"]] = True
        return mask


def losses(
    evaluator: Evaluator, rows: Sequence[np.ndarray], short: int, step: int, length: int, firsts: Sequence[int] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Losses `[n]` of the predictions of spans `[n + 1]` within a short context (NaN for the first `short`) and the whole one.

    `length` is the evaluator's, at least every n. `firsts`: the prediction of each span from which on it is asked, NaN before it.
    """
    begun = [0] * len(rows) if firsts is None else firsts
    asked = [Item(row[: first + 1], row[first + 1 :]) for row, first in zip(rows, begun, strict=True)]
    whole = evaluator.backend(length).loglikelihood(asked)
    places, windows = [], []
    for i, (row, first) in enumerate(zip(rows, begun, strict=True)):
        n = len(row) - 1
        for start in range(max(short, first), n, step):
            end = min(start + step, n)
            places.append((i, start, end))
            windows.append(Item(row[start - short : start + 1], row[start + 1 : end + 1]))
    found = [(np.full(len(row) - 1, np.nan), np.full(len(row) - 1, np.nan)) for row in rows]
    for (_, after), scores, first in zip(found, whole, begun, strict=True):
        after[first:] = scores.nll
    if windows:
        for (i, start, end), scores in zip(places, evaluator.backend(short + step).loglikelihood(windows), strict=True):
            found[i][0][start:end] = scores.nll
    return found


def is_key(before: np.ndarray, after: np.ndarray, short: int) -> np.ndarray:
    """Which of the tokens `[n]` with these losses within a short and a whole context are key tokens."""
    with np.errstate(invalid="ignore"):
        return (np.arange(len(after)) >= short) & (before - after > GAIN) & (after < MOST)


def carried(found: np.ndarray, theirs: Sequence[str], ours: Sequence[str], shift: int = 0) -> np.ndarray:
    """Key tokens of one tokenizer as those of another: tokens of `ours` whose text lies within a run of marked ones of `theirs`.

    `shift`: by how many characters their first token begins later.
    """
    ends = list(itertools.accumulate(map(len, theirs), initial=shift))
    # Runs of marked text, so that a token of ours may span several of theirs.
    starts, stops = [], []
    for marked, (first, end) in zip(found, itertools.pairwise(ends), strict=True):
        if marked and stops and stops[-1] == first:
            stops[-1] = end
        elif marked:
            starts.append(first)
            stops.append(end)
    mask, at = np.zeros(len(ours), bool), 0
    for i, text in enumerate(ours):
        run = bisect.bisect_right(starts, at) - 1
        mask[i] = bool(text) and run >= 0 and at + len(text) <= stops[run]
        at += len(text)
    return mask


def passage(texts: Sequence[str], gains: np.ndarray, found: np.ndarray) -> dict[str, list]:
    """The `SHOWN` tokens in a row that hold the most key tokens: their text, LongCE's weights (1 where no short context was read),
    and which of them are key tokens."""
    counts = np.convolve(found, np.ones(min(SHOWN, len(found)), int), "valid")
    first = int(np.argmax(counts))
    here = slice(first, first + SHOWN)
    weights = longce_weights(gains[here]).round(2).tolist()
    return {"texts": list(texts[here]), "weights": weights, "keys": np.flatnonzero(found[here]).tolist()}
