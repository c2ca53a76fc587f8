"""Needles over length and depth: is what stands at depth d of a context of T tokens still found from its end?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from lcx.core.errors import UserError
from lcx.data.sources.sources import Subset
from lcx.data.tasks.base import RetrievalTask
from lcx.data.tasks.table import make_task
from lcx.evals.base import Backend, Item, Materials, Questions, Scores

_STREAM = 0x6E65_6564
"""Sets the draws of evaluation apart from training's, whose seeds are numbers without this one among them."""


@dataclasses.dataclass(frozen=True)
class Needles(Questions):
    """Needles of the mixture's retrieval task in held-out text, one of them queried, among as many others as in training.

    Found means that every token of the answer is the most likely one given all before it: one forward pass, no generation.
    """

    name = "needles"
    task: RetrievalTask
    haystack: Subset
    depths: Sequence[float]
    seed: int
    counts: tuple[int, int]

    @classmethod
    def build(cls, materials: Materials) -> Self | None:
        """The items of the mixture's first retrieval task, or of the one that `evals.task` names."""
        config, counts = materials.config, cls.counts_of(materials)
        named = config.task or any(part.is_retrieval for part in materials.data.parts.values())
        if not (named and any(counts) and config.depths):
            return None
        part = materials.part(config.task, "task", is_task=True)
        task = make_task(part.kind, part.task, materials.tokenizer)
        return cls(task, materials.heldout(part.source), config.depths, config.seed, counts)

    @staticmethod
    def counts_of(materials: Materials) -> tuple[int, int]:
        """Items a cell under the checkpoint's own scheme and under another."""
        config = materials.config
        return config.needle_items, config.zero_shot_items * bool(config.zero_shot)

    def check(self, length: int) -> None:
        """Raises `UserError` for a length that the needles, or the text, are too short or too long for."""
        try:
            self.items(length, 1)
        except UserError as error:
            raise UserError(f"evals.lengths has {length:,}, which does not suit {self.name}: {error}") from error

    def count(self, zero_shot: bool) -> int:
        """`evals.needle_items`, or `evals.zero_shot_items`."""
        return self.counts[zero_shot]

    def items(self, length: int, count: int) -> list[Item]:
        """`length` counts all tokens up to the answer's last; keys, values and text are drawn from seed, length and depth."""
        made = []
        for cell, depth in enumerate(self.depths):
            rng = np.random.default_rng([self.seed, _STREAM, length, cell])
            samples = self.task.sample(rng, length, self.haystack, count, depth=depth)
            start, end = samples.answer_start, samples.answer_start + samples.answer_length
            made += [Item(row[:start], row[start:end], depth) for row in samples.tokens]
        return made

    def ask(self, backend: Backend, items: Sequence[Item]) -> Sequence[Any]:
        """Scores of the answers."""
        return backend.loglikelihood(items)

    def score(self, item: Item, output: Scores) -> float:
        """1 if every answer token is the most likely one."""
        return float(np.all(output.correct))


@dataclasses.dataclass(frozen=True)
class GeneratedNeedles(Needles):
    """The same items, answered by greedy generation; under the checkpoint's own scheme only."""

    name = "generated_needles"

    @staticmethod
    def counts_of(materials: Materials) -> tuple[int, int]:
        """`evals.generation_items`, and none under another scheme."""
        return materials.config.generation_items, 0

    def ask(self, backend: Backend, items: Sequence[Item]) -> Sequence[Any]:
        """Greedy continuations."""
        return Questions.ask(self, backend, items)

    def score(self, item: Item, output: np.ndarray) -> float:
        """1 if the continuation begins with the answer."""
        return float(np.array_equal(output[: len(item.answer)], item.answer))
