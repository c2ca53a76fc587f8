"""The score `quality`: labels → vectors → logistic regression, as P(good) of a document (the recipe of phi-1, arXiv:2306.11644).

Labels are of few documents; the classifier gives every document a number. Legend: N examples, F features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core import configs
from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.data.curation import labels, words
from lcx.data.curation.answers import key_of
from lcx.data.curation.classifier import Classifier, fit, held_out_figures
from lcx.data.curation.embed import EmbedConfig, Embedder, EmbedderFactory, build_embedder, fitted, normalised
from lcx.data.curation.labels import AskFactory, LabelConfig, Labels
from lcx.data.curation.scores import Corpus, ScoreConfig, ScorerFactory, build_scorers

LEAST = 5
"""Labels of either kind without which nothing is learned."""
BUCKETS = 1 << 12
_BLOCK = 1 << 20
_BATCH_CHARS = 1 << 22


@dataclasses.dataclass(frozen=True)
class QualitySettings:
    """What the classifier learns from, and how.

    `trigrams`: sequences of three bytes, counted, beside the vectors of `embedding`, which see what a text is about but hardly how
    it is written: a mean over tokens does not change with their order. `held_out`: share of the labels that are not learned from
    and give the figures in the report. `penalty`: of large weights. `rounds` above 1: documents that the classifier is `confidence`
    sure about, at most `round_documents`, are labels for the next round.
    """

    labels: LabelConfig
    embedding: EmbedConfig = EmbedConfig()
    trigrams: bool = True
    held_out: float = 0.2
    penalty: float = 0.01
    rounds: int = 1
    confidence: float = 0.95
    round_documents: int = 10_000

    def __post_init__(self) -> None:
        positive("quality", penalty=self.penalty, rounds=self.rounds, round_documents=self.round_documents)
        if not 0 < self.held_out < 1:
            raise UserError(f"quality.held_out={self.held_out} must be between 0 and 1")
        if not 0.5 <= self.confidence < 1:
            raise UserError(f"quality.confidence={self.confidence} must be at least 0.5 and below 1")


def factory(
    scorers: Mapping[str, ScorerFactory], embedders: Mapping[str, EmbedderFactory], ask: AskFactory | None
) -> ScorerFactory:
    """What builds the score from its config, given other scores, embedders that need a model, and a way to ask an endpoint."""
    return lambda config: Quality(config, scorers, embedders, ask)


class Quality:
    """A score that learns from labels; see `QualitySettings`. Raises `UserError` for settings that cannot be met."""

    def __init__(
        self,
        config: ScoreConfig,
        scorers: Mapping[str, ScorerFactory],
        embedders: Mapping[str, EmbedderFactory],
        ask: AskFactory | None,
    ) -> None:
        self._settings = configs.build(QualitySettings, config.settings, "quality.settings")
        self._scorers, self._ask = scorers, ask
        library("sklearn.linear_model", "a quality classifier", "data")
        self._embedder = build_embedder(self._settings.embedding, embedders)
        self.fingerprint = configs.fingerprint(self._settings) + f" {self._embedder.fingerprint} {self._source()}"

    def learn(self, corpus: Corpus, folder: pathlib.Path) -> tuple[Predictor, dict[str, Any]]:
        """The classifier, and figures of it; raises `UserError` for labels that are missing or all of one kind."""
        settings, found = self._settings, self._labels(corpus, folder)
        texts = lambda: (text for _, text in corpus())  # noqa: E731
        embedder = fitted(self._embedder, texts())
        features = Features(embedder, settings.trigrams)
        keys, x_NF = _examples(features, found, corpus)
        good_N = np.array([found[key] for key in keys], bool)
        for kind, count in (("good", int(good_N.sum())), ("not good", int((~good_N).sum()))):
            if count < LEAST:
                raise UserError(f"{count} of {len(keys)} labelled documents are {kind}, and a classifier needs {LEAST}; label more")
        held_N = _held_out(keys, good_N, settings.held_out)
        train_x, train_good = x_NF[~held_N], good_N[~held_N]
        predictor = Predictor(features, fit(train_x, train_good, settings.penalty))
        rounds = [_figures(predictor, x_NF, good_N, held_N, 0, 0)]
        for _ in range(1, settings.rounds):
            more_x, more_good = self._confident(predictor, corpus, set(found))
            if not len(more_x):
                break
            x, good = np.concatenate([train_x, more_x]), np.concatenate([train_good, more_good])
            predictor = Predictor(features, fit(x, good, settings.penalty))
            rounds.append(_figures(predictor, x_NF, good_N, held_N, int(more_good.sum()), int((~more_good).sum())))
        return predictor, {
            "embedding": embedder.kind,
            "features": x_NF.shape[1],
            "labels": {**found.counts, "labelled": len(found), "used": len(keys)},
            "train": {"good": int(train_good.sum()), "not_good": int((~train_good).sum())},
            "held_out": {"good": int(good_N[held_N].sum()), "not_good": int((~good_N[held_N]).sum())},
            "rounds": rounds,
        }

    def _source(self) -> str:
        """What the labels depend on beside the settings."""
        of = self._settings.labels
        if of.file is not None:
            try:
                content = pathlib.Path(of.file.path).expanduser().read_bytes()
            except OSError as error:
                raise UserError(
                    f"labels.file.path={of.file.path!r} cannot be read ({error}); name a JSONL file of labels"
                ) from error
            return hashlib.blake2b(content, digest_size=8).hexdigest()
        if of.score is not None:
            return build_scorers({"labels": of.score.score}, self._scorers)["labels"].fingerprint
        if self._ask is None:
            raise UserError("labels.endpoint needs a caller that asks endpoints; lcx data curate does, or use labels.file")
        return ""

    def _labels(self, corpus: Corpus, folder: pathlib.Path) -> Labels:
        of = self._settings.labels
        if of.file is not None:
            return labels.from_file(of.file, corpus)
        if of.score is not None:
            return labels.from_score(of.score, corpus, self._scorers)
        assert of.endpoint is not None and self._ask is not None
        return labels.from_endpoint(of.endpoint, corpus, self._ask(of.endpoint), folder)

    def _confident(self, predictor: Predictor, corpus: Corpus, known: set[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 `[N, F]` and labels bool `[N]` of documents without a label that the classifier is sure about."""
        sure, heap = self._settings.confidence, []
        for names, texts in _batches(corpus()):
            for key, x in predictor.features.usable(texts, names):
                p = float(predictor.classifier(x[None])[0])
                if key not in known and (p >= sure or p <= 1 - sure):
                    heapq.heappush(heap, (-int(key, 16), p > 0.5, x.tobytes()))
                    if len(heap) > self._settings.round_documents:
                        heapq.heappop(heap)
        x = np.array([np.frombuffer(row, np.float32) for _, _, row in sorted(heap, reverse=True)], np.float32)
        return x, np.array([good for _, good, _ in sorted(heap, reverse=True)], bool)


class Features:
    """Vectors of an embedder, with the trigrams of bytes beside them or not."""

    def __init__(self, embedder: Embedder, trigrams: bool) -> None:
        self._embedder, self._trigrams = embedder, trigrams

    def __call__(self, texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """Features float32 `[N, F]`."""
        found = self._embedder(texts, names)
        return np.concatenate([found, np.array([trigrams(text) for text in texts])], 1) if self._trigrams else found

    def usable(self, texts: Sequence[str], names: Sequence[str]) -> list[tuple[str, np.ndarray]]:
        """Key and features float32 `[F]` of each text, without those that cannot be embedded."""
        try:
            rows = list(zip(texts, self(texts, names), strict=True))
        except UserError:
            raise
        except Exception:
            rows = []
            for i, text in enumerate(texts):
                with contextlib.suppress(Exception):
                    rows.append((text, self([text], names[i : i + 1])[0]))
        return [(key_of(text), x) for text, x in rows if not np.isnan(x).any()]


def trigrams(text: str) -> np.ndarray:
    """ln(1 + how often the sequences of three bytes of a bucket occur), float32 `[F]` of length 1 for `BUCKETS` buckets."""
    content = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    counts = np.zeros(BUCKETS, np.int64)
    for at in range(0, len(content) - 2, _BLOCK):
        codes = content[at : at + _BLOCK + 2].astype(np.uint64)
        keys = words.mix(codes[:-2] << np.uint64(16) | codes[1:-1] << np.uint64(8) | codes[2:])
        counts += np.bincount((keys % np.uint64(BUCKETS)).astype(np.int64), minlength=BUCKETS)
    return normalised(np.log1p(counts)[None])[0]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The scorer that has been learned."""

    features: Features
    classifier: Classifier
    fingerprint: str = "learned"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """P(good) float32 `[N]`."""
        return self.named(texts, ())

    def named(self, texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """P(good) float32 `[N]` of documents with names."""
        return self.classifier(self.features(texts, names))


def _examples(features: Features, found: Labels, corpus: Corpus) -> tuple[list[str], np.ndarray]:
    """Keys and features float32 `[N, F]` of everything that has a label, sorted by key; without what cannot be embedded."""
    rows: dict[str, np.ndarray] = {}
    there = ((name, text) for name, text in corpus() if key_of(text) in found and key_of(text) not in found.texts)
    given = (("", text) for text in found.texts.values())
    for source in (there, given):
        for names, texts in _batches(source):
            rows |= dict(features.usable(texts, names if any(names) else ()))
    keys = sorted(rows)
    return keys, np.array([rows[key] for key in keys], np.float32)


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    names, texts, size = [], [], 0
    for name, text in documents:
        names.append(name)
        texts.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield names, texts
            names, texts, size = [], [], 0
    if texts:
        yield names, texts


def _held_out(keys: Sequence[str], good_N: np.ndarray, share: float) -> np.ndarray:
    """bool `[N]`: that share of either kind, at least one, those whose hashes are smallest."""
    held = np.zeros(len(keys), bool)
    order = sorted(range(len(keys)), key=lambda i: hashlib.blake2b(keys[i].encode(), digest_size=8).digest())
    for kind in (True, False):
        of_kind = [i for i in order if good_N[i] == kind]
        held[of_kind[: min(len(of_kind) - 1, max(1, round(share * len(of_kind))))]] = True
    return held


def _figures(predictor: Predictor, x_NF: np.ndarray, good_N: np.ndarray, held_N: np.ndarray, good: int, bad: int) -> dict[str, Any]:
    return {"added_good": good, "added_not_good": bad, **held_out_figures(predictor.classifier(x_NF[held_N]), good_N[held_N])}
