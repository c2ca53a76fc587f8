"""A model that reads documents for their scores: loaded once, asked in batches of few shapes, so that few programs are compiled.

Legend: D documents, B rows in one forward pass, T tokens, n predicted tokens.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from lcx.core.configs import plain, positive
from lcx.core.errors import UserError
from lcx.data.tokenizers import tokenizers
from lcx.evals.base import Evaluator, Item
from lcx.model.architecture import Architecture, build_architecture, build_schemes
from lcx.recipes import models
from lcx.recipes.recipe import backend_of
from lcx.training.loading import Loaded

TOKENS_AT_ONCE = 1 << 21
"""Tokens of documents that are prepared together."""


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Which model reads: a workdir (the end of `stage`, or the newest checkpoint), a Hugging Face folder or a GGUF file.

    It reads `tokens_per_forward` tokens at a time, but at least one row.
    """

    model: str
    stage: str | None = None
    dtype: str = "float32"
    tokens_per_forward: int = 1 << 14

    def __post_init__(self) -> None:
        positive("settings", tokens_per_forward=self.tokens_per_forward)


class Reader:
    """A model that reads documents."""

    def __init__(self, loaded: Loaded, name: str, tokens_per_forward: int = 1 << 14) -> None:
        self.loaded, self.name, self.tokens_per_forward = loaded, name, tokens_per_forward
        self.tokenizer = tokenizers.load(loaded.run.data.tokenizer)
        self.backend = functools.cache(lambda length: backend_of(loaded, length, tokens_per_forward=tokens_per_forward))
        self.evaluator = Evaluator(self.backend, self.tokenizer, name)

    @classmethod
    def load(cls, config: ReaderConfig) -> Self:
        """Load the weights; raises `UserError` for what is not a model."""
        return cls(models.load(config.model, stage=config.stage, dtype=config.dtype), config.model, config.tokens_per_forward)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells it from every other model, and its tokenizer from others."""
        return f"{self.backend(256).fingerprint} {self.tokenizer.fingerprint}"

    def check(self, name: str, window: int) -> None:
        """Raises `UserError` for a window of more tokens than the model was trained on."""
        if window > (most := self.loaded.meta.length):
            raise UserError(
                f"{name} would read {window:,} tokens at once, but {self.name} was trained on {most:,}; lower it to at most that"
            )

    def read(self, texts: Sequence[str], window: int | None = None) -> list[np.ndarray]:
        """Tokens int32 of each text, the first `window` (None: all)."""
        return [self.tokenizer.encode(text)[:window] for text in texts]

    def architecture(self, length: int) -> tuple[Any, Any]:
        """The static part of the model, and its buffers, for rows of `length` tokens."""
        run = self.loaded.run
        return build_architecture(run.model, run.execution, build_schemes(run.model, self.loaded.schemes), length)

    def losses(self, rows: Sequence[np.ndarray], window: int) -> list[np.ndarray]:
        """The loss in nats, float32 `[n]`, of every token of rows `[n + 1]` but the first."""
        found: list[Any] = [None] * len(rows)
        for length, numbers in by_length([len(row) - 1 for row in rows], window):
            items = [Item(rows[i][:1], rows[i][1:]) for i in numbers]
            for i, scores in zip(numbers, self.backend(length).loglikelihood(items), strict=True):
                found[i] = scores.nll
        return found


def by_length(sizes: Sequence[int], most: int, unit: int = 256) -> Iterator[tuple[int, list[int]]]:
    """Lengths that rows of these sizes are padded to (`unit` · 2^i, at most `most`), each with the numbers of some rows.

    Rows that come together have no more than `TOKENS_AT_ONCE` tokens.
    """
    lengths = [min(most, unit << (-(-size // unit) - 1).bit_length()) for size in sizes]
    for length in sorted(set(lengths)):
        numbers = [i for i, own in enumerate(lengths) if own == length]
        step = max(1, TOKENS_AT_ONCE // length)
        for first in range(0, len(numbers), step):
            yield length, numbers[first : first + step]


@dataclasses.dataclass(frozen=True)
class ModelScore(abc.ABC):
    """A score of texts, float32 `[D]`: NaN where a text is too short for it."""

    kind: ClassVar[str]
    settings_class: ClassVar[type]
    reader: Reader
    settings: Any

    def __post_init__(self) -> None:
        self.reader.check(f"{self.kind}.{self.limit[0]}", self.limit[1])

    @property
    def limit(self) -> tuple[str, int]:
        """The setting that says how many tokens are read at once, and how many those are."""
        return "window", self.settings.window

    @property
    def fingerprint(self) -> str:
        """Changes with the settings and the model."""
        named = json.dumps([self.kind, 1, plain(self.settings), self.reader.fingerprint], sort_keys=True)
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    @abc.abstractmethod
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The scores of the texts."""


def batches(
    reader: Reader, rows: Sequence[np.ndarray], window: int, unit: int
) -> Iterator[tuple[list[int], np.ndarray, Architecture, Any]]:
    """Rows in batches of few shapes: their numbers, tokens int32 `[B, T]`, and the model and its buffers for that length.

    Rows are padded behind their end, and a batch that is not full is filled up, with zeros. T is as in `by_length`.
    """
    for length, members in by_length([len(row) for row in rows], window, unit):
        arch, buffers = reader.architecture(length)
        count = max(1, reader.tokens_per_forward // length)
        for first in range(0, len(members), count):
            numbers = members[first : first + count]
            tokens = np.zeros((count, length), np.int32)
            for place, i in enumerate(numbers):
                tokens[place, : len(rows[i])] = rows[i]
            yield numbers, tokens, arch, buffers
