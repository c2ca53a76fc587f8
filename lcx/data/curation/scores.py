"""Scores of documents: what computes one, and a shard's column of them.

`data` knows no model. A kind of score that needs one is a factory that the caller of `curate` passes in (`lcx.recipes` has them);
kinds that need none are in `lcx.data.curation.pipeline`. Legend: D documents.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lcx.core.configs import choice, nearest
from lcx.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """A score: `kind` says what it is, `settings` are those of the kind, `sources` whose documents get it (empty: all)."""

    kind: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = ()


class Scorer(Protocol):
    """Texts to scores. `fingerprint` changes with whatever changes a score: settings, a model's weights, a version."""

    fingerprint: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores float32 `[D]`; NaN where a document cannot be scored. What it raises is held against the document alone."""
        ...


Corpus = Callable[[], Iterator[tuple[str, str]]]
"""Called, it gives name and text of every document that a score is for, in order, from the start."""


@runtime_checkable
class Learner(Protocol):
    """A scorer that has to see the corpus first. `fingerprint` stands for all that it learns from besides the corpus."""

    fingerprint: str

    def learn(self, corpus: Corpus, folder: pathlib.Path) -> tuple[Scorer, dict[str, Any]]:
        """The scorer, and what the report says of the learning. The same corpus gives the same scorer.

        `folder` is the curation's, for what was costly to get and is to be kept.
        """
        ...


@runtime_checkable
class Named(Protocol):
    """A scorer that goes by the names of documents too."""

    def named(self, texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """Scores float32 `[D]`, as those of `Scorer`."""
        ...


ScorerFactory = Callable[[ScoreConfig], Scorer | Learner]
"""Builds a scorer from its config; raises `UserError` for settings that the kind does not have."""


def check_scores(scores: Mapping[str, ScoreConfig], sources: Sequence[str]) -> None:
    """Raises `UserError` for a name that cannot be a file's, and for sources that are not there."""
    for name, score in scores.items():
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"config.scores has the name {name!r}, which names a file; use letters, digits, '_' and '-'")
        for source in score.sources:
            choice(f"config.scores.{name}.sources", source, sources)


def build_scorers(scores: Mapping[str, ScoreConfig], factories: Mapping[str, ScorerFactory]) -> dict[str, Scorer | Learner]:
    """The scorers by name, sorted; raises `UserError` for a kind without a factory."""
    found = {}
    for name, score in sorted(scores.items()):
        if score.kind not in factories:
            raise UserError(f"config.scores.{name}.kind={score.kind!r} has no scorer here{nearest(score.kind, factories)}")
        found[name] = factories[score.kind](score)
    return found


@dataclasses.dataclass(frozen=True)
class Column:
    """A score of some documents: `values` float32 `[D]`, NaN where there is none; `errors`: what was raised, by place."""

    values: np.ndarray
    errors: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The column as a file's content."""
        values = [number(value) for value in self.values]
        return json.dumps({"values": values, "errors": {str(i): error for i, error in self.errors.items()}})

    @classmethod
    def from_json(cls, content: str | bytes) -> Column:
        """What `to_json` gave, to the bit."""
        read = json.loads(content)
        values = np.array([math.nan if value is None else value for value in read["values"]], np.float32)
        return cls(values, {int(i): (reason, message) for i, (reason, message) in read["errors"].items()})


def score(name: str, scorer: Scorer, texts: Sequence[str], names: Sequence[str] = ()) -> Column:
    """The score of some documents; one whose scoring raises has the name of the error and its message instead.

    A score that is not finite counts as none. Raises `UserError` if a scorer gives anything but a number for each document.
    """
    if not texts:
        return Column(np.zeros(0, np.float32))
    try:
        found = _call(scorer, texts, names)
    except Exception:
        return _one_by_one(name, scorer, texts, names)
    return Column(_finite(name, found, len(texts)))


def _call(scorer: Scorer, texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
    return scorer.named(texts, names) if isinstance(scorer, Named) else scorer(texts)


def _one_by_one(name: str, scorer: Scorer, texts: Sequence[str], names: Sequence[str]) -> Column:
    values, errors = np.full(len(texts), np.nan, np.float32), {}
    for i, text in enumerate(texts):
        try:
            found = _call(scorer, [text], names[i : i + 1])
        except Exception as error:
            errors[i] = type(error).__name__, f"{type(error).__name__}: {error}"
        else:
            values[i] = _finite(name, found, 1)[0]
    return Column(values, errors)


def number(value: float) -> float | None:
    """A float32 as the shortest decimal that gives it back, None for NaN: what JSON holds."""
    return None if math.isnan(value) else float(str(np.float32(value)))


def _finite(name: str, values: np.ndarray, count: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (count,) or values.dtype.kind not in "fiu":
        raise UserError(f"the scorer of config.scores.{name} gave {values.dtype}{values.shape}, not {count} numbers")
    values = values.astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(np.nan))
