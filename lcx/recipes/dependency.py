"""Long-dependency scores of documents with a model: how much of a document depends on what lies far back in it.

Any model will do that `lcx eval` takes, and any of its positional schemes. Nothing but losses and sums of attention is kept of what
it says. The formulas are in `lcx.data.curation.dependency`. Legend: D documents.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lcx.core.mesh import mesh_of
from lcx.data.curation import dependency
from lcx.data.curation.dependency import EntropyDropSettings, LadmSettings, LdsSettings, LongAttnSettings
from lcx.data.curation.scores import Corpus, Scorer
from lcx.data.sources.sources import text_hash
from lcx.evals.backends.local import fetch
from lcx.evals.base import Item
from lcx.evals.tasks.key_tokens import losses
from lcx.model.attention_mass import chunk_mass, distant_mass
from lcx.recipes.reader import TOKENS_AT_ONCE, ModelScore, batches, by_length


class Lds(ModelScore):
    """ProLong's long-dependency score; a text of fewer than two segments has none."""

    kind, settings_class = "lds", LdsSettings
    settings: LdsSettings

    @property
    def limit(self) -> tuple[str, int]:
        """Two segments are read at a time."""
        return "segment times 2", 2 * self.settings.segment

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The scores; which segments and pairs are drawn depends on the text and the seed alone."""
        segment = self.settings.segment
        found, drawn = np.full(len(texts), np.nan, np.float32), []
        for i, text in enumerate(texts):
            (tokens,) = self.reader.read([text])
            count = len(tokens) // segment
            if count > 1:
                rng = np.random.default_rng((self.settings.seed, _hash(text)))
                chosen = np.sort(rng.choice(count, min(count, self.settings.segments), replace=False))
                segments = tokens[: count * segment].reshape(count, segment)[chosen]
                drawn.append((i, segments, dependency.lds_pairs(len(segments), self.settings, rng)))
            if sum(len(pairs) for _, _, pairs in drawn) * 2 * segment >= TOKENS_AT_ONCE or i == len(texts) - 1:
                for number, value in self._scored(drawn):
                    found[number] = value
                drawn = []
        return found

    def _scored(self, drawn: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[tuple[int, float]]:
        """Number and score of texts whose segments and pairs are given."""
        length = self.settings.segment
        singles = [Item(one[:1], one[1:]) for _, segments, _ in drawn for one in segments]
        paired = [
            Item(np.concatenate([segments[j], segments[i][:1]]), segments[i][1:]) for _, segments, pairs in drawn for i, j in pairs
        ]
        single, conditional = (
            iter([_perplexity(scores.nll) for scores in self.reader.backend(size).loglikelihood(items)])
            for size, items in ((length, singles), (2 * length, paired))
        )
        for number, segments, pairs in drawn:
            first = np.asarray([next(single) for _ in segments])
            second = np.asarray([next(conditional) for _ in pairs])
            yield number, dependency.lds(first, pairs, second, self.settings)


def _perplexity(nll: np.ndarray) -> float:
    return math.exp(float(np.mean(nll, dtype=np.float64)))


class EntropyDrop(ModelScore):
    """What the whole context adds to a short one at the end of a text; no score where the end has no more than a short one."""

    kind, settings_class = "entropy_drop", EntropyDropSettings
    settings: EntropyDropSettings

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The scores."""
        settings = self.settings
        rows = self.reader.read(texts, settings.window)
        kept = [i for i, row in enumerate(rows) if settings.first(len(row) - 1) >= settings.short]
        found = np.full(len(texts), np.nan, np.float32)
        for length, numbers in by_length([len(rows[i]) - 1 for i in kept], settings.window):
            asked = [rows[kept[i]] for i in numbers]
            firsts = [settings.first(len(row) - 1) for row in asked]
            pairs = losses(self.reader.evaluator, asked, settings.short, settings.step, length, firsts)
            for i, (before, after) in zip(numbers, pairs, strict=True):
                found[kept[i]] = dependency.entropy_drop(before, after)
        return found


class Ladm(ModelScore):
    """LADM's contextual dependency score; a text without a chunk to score has none."""

    kind, settings_class = "ladm", LadmSettings
    settings: LadmSettings

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The scores."""
        settings = self.settings
        rows = self.reader.read(texts, settings.window)
        found = np.full(len(texts), np.nan, np.float32)
        kept = [i for i, row in enumerate(rows) if len(row) >= settings.first + settings.chunk]
        for numbers, tokens, arch, buffers in batches(self.reader, [rows[i] for i in kept], settings.window, settings.stride):
            params = self.reader.loaded.params
            with mesh_of(params):
                mass = fetch(chunk_mass(params, buffers, tokens, arch, settings.chunk, settings.stride))
            for place, i in enumerate(numbers):
                found[kept[i]] = dependency.ladm(mass[place], len(rows[kept[i]]), settings)
        return found


class LongAttn(ModelScore):
    """LongAttn; each of its two parts is scaled to the range that it has in the corpus, which is therefore read first."""

    kind, settings_class = "longattn", LongAttnSettings
    settings: LongAttnSettings

    def measure(self, texts: Sequence[str]) -> np.ndarray:
        """Strength and variance of distant attention, float64 `[D, 2]`."""
        settings = self.settings
        rows = self.reader.read(texts, settings.window)
        found = np.full((len(texts), 2), np.nan)
        kept = [i for i, row in enumerate(rows) if len(row) >= settings.min_tokens]
        for numbers, tokens, arch, buffers in batches(self.reader, [rows[i] for i in kept], settings.window, 64):
            sizes = np.ones(len(tokens), np.int32)
            sizes[: len(numbers)] = [len(rows[kept[i]]) for i in numbers]
            least = np.ceil(sizes * settings.distance).astype(np.int32)
            params = self.reader.loaded.params
            with mesh_of(params):
                sums = distant_mass(params, buffers, tokens, sizes, least, arch)
            mass, squares = (np.sum(fetch(x), axis=1, dtype=np.float64) for x in sums)
            for place, i in enumerate(numbers):
                found[kept[i]] = dependency.longattn_parts(mass[place], squares[place], int(sizes[place]))
        return found

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The scores of the texts among themselves."""
        parts = self.measure(texts)
        return self._scale(parts, *_range(parts))

    def learn(self, corpus: Corpus, folder: pathlib.Path) -> tuple[Scorer, dict[str, Any]]:
        """The scorer of a corpus, which remembers the parts that it has measured, and their ranges. Keeps nothing in `folder`."""
        known: dict[int, np.ndarray] = {}
        for texts in _groups(text for _, text in corpus()):
            known |= zip(map(_hash, texts), self.measure(texts), strict=True)
        least, most = _range(np.asarray([*known.values(), [np.nan, np.nan]]))
        ranges = {name: [low, high] for name, low, high in zip(("strength", "variance"), least, most, strict=True)}
        return _Known(self.fingerprint, lambda texts: self._scale(np.stack([known[_hash(x)] for x in texts]), least, most)), ranges

    def _scale(self, parts: np.ndarray, least: Sequence[float], most: Sequence[float]) -> np.ndarray:
        return dependency.longattn(parts, np.asarray(least), np.asarray(most), self.settings.weight).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Known:
    """A scorer of texts that have been measured."""

    fingerprint: str
    score: Callable[[Sequence[str]], np.ndarray]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.score(texts)


def _range(parts: np.ndarray) -> tuple[list[float], list[float]]:
    """The least and the most of each part `[D, 2]`, of the documents that have it."""
    there = parts[np.isfinite(parts).all(axis=1)]
    return (there.min(axis=0).tolist(), there.max(axis=0).tolist()) if len(there) else ([0.0, 0.0], [0.0, 0.0])


def _hash(text: str) -> int:
    return text_hash(text.encode("utf-8", "surrogatepass"))


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts, some megabytes at a time."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(map(len, group)) >= TOKENS_AT_ONCE or len(group) >= 1024:
            yield group
            group = []
    if group:
        yield group
