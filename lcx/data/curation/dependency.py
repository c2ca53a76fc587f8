"""Whether a document needs its length: scores from losses and attention that some model gave for it.

The formulas alone, over numbers and in float64; `lcx.recipes.dependency` asks a model for the numbers. The defaults of the settings
are the published ones, which are meant for windows of 32,768 tokens; each docstring says what suits a small model.

Legend: N segments, P pairs of segments, n predicted tokens, L layers, C query chunks, K key blocks, H heads, D documents.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lcx.core.configs import positive
from lcx.core.errors import UserError

MOST_WEIGHT = 5.0
"""LongCE's largest weight."""


@dataclasses.dataclass(frozen=True)
class LdsSettings:
    """ProLong's long-dependency score (LDS, 2405.17915): how much one segment of a document lowers the perplexity of a later one.

    Segments of `segment` tokens; of more than `window / segment` of them so many are drawn, in order. `pairs` pairs of segments are
    drawn, and one counts if the perplexity falls by more than the share `threshold`. Small models: `window=4096, pairs=200`, which
    is 52,000 tokens to read for a document.
    """

    segment: int = 128
    window: int = 32768
    pairs: int = 500
    threshold: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        positive("lds", segment=self.segment, window=self.window, pairs=self.pairs)
        if self.segment < 2 or self.segments < 2:
            raise UserError(
                f"lds.window={self.window} must hold at least two segments of lds.segment={self.segment} tokens, at least 2"
            )

    @property
    def segments(self) -> int:
        """The most segments of one document."""
        return self.window // self.segment


@dataclasses.dataclass(frozen=True)
class LadmSettings:
    """LADM's contextual dependency score (2503.02502): how far back attention reaches, and how unevenly.

    Every `stride` tokens a chunk of `chunk` queries looks at the blocks of `chunk` keys that lie `interval`, 2 · `interval`, …
    tokens before it. A document is read up to `window` tokens. Small models: `chunk=32, stride=128, interval=128, window=2048`.
    """

    chunk: int = 128
    stride: int = 512
    interval: int = 512
    window: int = 32768

    def __post_init__(self) -> None:
        positive("ladm", chunk=self.chunk, stride=self.stride, interval=self.interval, window=self.window)
        for name, unit in (("stride", "chunk"), ("interval", "chunk"), ("window", "stride")):
            if getattr(self, name) % getattr(self, unit):
                raise UserError(f"ladm.{name}={getattr(self, name)} must be a multiple of ladm.{unit}={getattr(self, unit)}")
        if self.first + self.chunk > self.window:
            raise UserError(f"ladm.window={self.window} holds no chunk to score; make it at least {self.first + self.chunk}")

    @property
    def first(self) -> int:
        """The first place of a chunk that has a block to look at: the first block of a document does not count."""
        return -(-(self.interval + self.chunk) // self.stride) * self.stride


@dataclasses.dataclass(frozen=True)
class LongAttnSettings:
    """LongAttn (2502.16860): attention of the first layer to keys at least the share `distance` of the document away.

    `weight` is that of the variance. A document is read up to `window` tokens, and has no score below `min_tokens`. Small models:
    `window=2048`.
    """

    window: int = 32768
    distance: float = 0.25
    weight: float = 0.5
    min_tokens: int = 64

    def __post_init__(self) -> None:
        positive("longattn", window=self.window, min_tokens=self.min_tokens)
        if not 0 < self.distance < 1:
            raise UserError(f"longattn.distance={self.distance} must be between 0 and 1, a share of the document")


@dataclasses.dataclass(frozen=True)
class EntropyDropSettings:
    """What the whole context adds to `short` tokens of it, in nats per token, over the last `tail` of a document.

    A short context has `short` to `short + step` tokens. A document is read up to `window` tokens. Small models: `window=4096`, or
    `short=64, step=16, window=1024` for one that was trained on 1,024.
    """

    short: int = 512
    step: int = 128
    window: int = 32768
    tail: float = 0.25

    def __post_init__(self) -> None:
        positive("entropy_drop", short=self.short, step=self.step, window=self.window)
        if not 0 < self.tail <= 1:
            raise UserError(f"entropy_drop.tail={self.tail} must be a share of the document above 0, at most 1")
        if self.first(self.window - 1) < self.short or self.short + self.step > self.window:
            raise UserError(
                f"entropy_drop.window={self.window} leaves the last {self.tail:g} of a document no more than entropy_drop.short="
                f"{self.short} tokens before it, or is less than short + step; raise the window or lower them"
            )

    def first(self, n: int) -> int:
        """Which of the `n` predictions of a document is the first that counts."""
        return n - math.ceil(n * self.tail)


@dataclasses.dataclass(frozen=True)
class LongCeSettings:
    """LongCE (2410.23771): a token's loss weighs exp(what the whole context adds to `short` tokens of it, in nats), at most `most`.

    The whole context is that of a row of `window` tokens, a short one has `short` to `short + step`. Small models: `window` as in
    training, `short` an eighth of it, `step` a quarter of `short`.
    """

    short: int = 4096
    step: int = 1024
    window: int = 32768
    most: float = MOST_WEIGHT

    def __post_init__(self) -> None:
        positive("longce", short=self.short, step=self.step, window=self.window, most=self.most)
        if 2 * max(self.short, self.step) >= self.window:
            raise UserError(
                f"longce.window={self.window} must be more than twice longce.short={self.short} and longce.step={self.step}"
            )


def lds_pairs(segments: int, settings: LdsSettings, rng: np.random.Generator) -> np.ndarray:
    """Pairs (i, j) of segments with j < i, int64 `[P, 2]` in order: `settings.pairs` that are drawn, or all if there are fewer."""
    later, earlier = np.tril_indices(segments, -1)
    count = min(settings.pairs, len(later))
    drawn = np.sort(rng.choice(len(later), count, replace=False))
    return np.stack([later[drawn], earlier[drawn]], axis=1)


def lds(perplexities: np.ndarray, pairs: np.ndarray, conditional: np.ndarray, settings: LdsSettings) -> float:
    """The long-dependency score of a document (2405.17915, equations 2 to 6).

    `perplexities` `[N]` are those of the segments by themselves, `conditional` `[P]` those of segment i behind segment j for the
    `pairs` (i, j) `[P, 2]`. A pair counts as its relative fall of perplexity plus its distance, from 0 to 1, times how specific
    segment i is about what it depends on: 1 − (entropy of the softmax of the falls) / (the most it can be).
    """
    marginal = np.asarray(perplexities, np.float64)
    later, earlier = np.asarray(pairs, np.int64).reshape(-1, 2).T
    falls = marginal[later] - np.asarray(conditional, np.float64)
    strength, distance = falls / marginal[later], (later - earlier) / (settings.segments - 1)
    counted = strength > settings.threshold
    total = 0.0
    for i in np.unique(later[counted]):
        here = later == i
        gained = np.sum((strength + distance)[here & counted])
        total += float(gained) * _specificity(falls[here])
    return total


def _specificity(falls: np.ndarray) -> float:
    if len(falls) == 1:
        return 1.0
    shares = np.exp(falls - falls.max())
    shares /= shares.sum()
    seen = shares[shares > 0]
    return float(np.clip(1 + np.sum(seen * np.log(seen)) / math.log(len(falls)), 0, 1))


def ladm(mass: np.ndarray, tokens: int, settings: LadmSettings) -> float:
    """The contextual dependency score of a document of `tokens` tokens (2503.02502); NaN if it is too short for a chunk.

    `mass` `[L, C, K]` is the attention of the chunk that begins at token C · `stride` to the key block K, summed over its queries
    and averaged over heads, where a query sees no key of its own chunk, a later one, or the document's first block. Of a chunk: the
    sum of the masses at the intervals, each times its distance as a share of the document, times the (population) standard
    deviation of these masses, times the chunk's place in the document. Then the mean over layers and the chunks with an interval.
    """
    mass = np.asarray(mass, np.float64)
    scores = []
    for start in range(settings.first, min(tokens, settings.window) - settings.chunk + 1, settings.stride):
        distances = np.arange(settings.interval, start - settings.chunk + 1, settings.interval)
        focus = mass[:, start // settings.stride, (start - distances) // settings.chunk]
        scores.append(focus @ (distances / tokens) * focus.std(axis=1) * (start / tokens))
    return float(np.mean(scores)) if scores else math.nan


def longattn_parts(mass: np.ndarray, squares: np.ndarray, tokens: int) -> tuple[float, float]:
    """Strength and variance of the distant attention of a document of `tokens` tokens (2502.16860).

    `mass` and `squares` `[H]` are the sums over the attention matrix of the weights at a distance, and of their squares. The
    strength is the mean over queries, the variance is over all entries of the matrix, those that are left out as zeros; both are
    means over heads.
    """
    mass, squares = np.asarray(mass, np.float64), np.asarray(squares, np.float64)
    return float(np.mean(mass / tokens)), float(np.mean(squares / tokens**2 - (mass / tokens**2) ** 2))


def longattn(parts: np.ndarray, least: np.ndarray, most: np.ndarray, weight: float) -> np.ndarray:
    """Scores `[D]` of documents from their (strength, variance) `[D, 2]`: the strength minus `weight` times the variance.

    Each is scaled from what is `least` to what is `most` `[2]` in a corpus to 0 to 1; a part that is the same everywhere is 0.
    """
    parts, least = np.asarray(parts, np.float64), np.asarray(least, np.float64)
    spread = np.asarray(most, np.float64) - least
    scaled = (parts - least) / np.where(spread > 0, spread, 1.0)
    return scaled[:, 0] - weight * scaled[:, 1]


def entropy_drop(before: np.ndarray, after: np.ndarray) -> float:
    """Mean fall of the loss, in nats, from `before` in a short context to `after` in the whole one, `[n]` each.

    Tokens whose loss in a short context is NaN do not count; NaN if none is left.
    """
    gains = np.asarray(before, np.float64) - np.asarray(after, np.float64)
    gains = gains[np.isfinite(gains)]
    return float(gains.mean()) if len(gains) else math.nan


def longce_weights(gains: np.ndarray, most: float = MOST_WEIGHT) -> np.ndarray:
    """LongCE's loss weights `[n]`, float64: min(exp(gain), `most`) for the `gains` in nats that a long context brings.

    1 where the gain is NaN, as for the first tokens, which a short context holds whole (2410.23771, section 4).
    """
    gains = np.asarray(gains, np.float64)
    return np.where(np.isfinite(gains), np.minimum(np.exp(np.minimum(gains, 700.0)), most), 1.0)
