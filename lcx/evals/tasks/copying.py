"""Copying and induction: what stood behind these words before, at a chosen distance, and a long list word for word."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from lcx.evals.base import Item, Materials
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import edits
from lcx.evals.text.questions import Draw, TextQuestions


@dataclasses.dataclass(frozen=True)
class Induction(TextQuestions):
    """Different words in random order, then three of them that followed one another; the next eight are wanted, at `evals.depths`.

    A unit is a word. The score is the share of words that are right up to the first wrong one. Chance is that of guessing a word.
    """

    grid: tuple[float, ...]

    answer_tokens = 40
    units_per_1024 = 128
    given, wanted = 3, 8

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's depths."""
        return {"grid": materials.config.depths}

    @property
    def depths(self) -> Sequence[float | None]:
        """Those of the evaluation: where the words that are wanted stand."""
        return self.grid

    def least(self, length: int) -> int:
        """Those that are given and wanted."""
        return self.given + self.wanted

    def answer(self, sample: Sample) -> str:
        """The words with spaces between them."""
        return " " + " ".join(sample.references)

    def compose(self, draw: Draw, units: int) -> Sample:
        """No word occurs twice, so that the three determine the rest."""
        listed = words.unique_words(draw.rng, units)
        at = round((draw.depth or 0.0) * (units - self.given - self.wanted))
        given, wanted = listed[at : at + self.given], listed[at + self.given : at + self.given + self.wanted]
        prompt = f"The words of a list:\n{' '.join(listed)}\nThe same list, continued from some point on:\n{' '.join(given)}"
        return Sample(prompt, "", tuple(wanted), draw.depth)

    def score(self, item: Item, output: str) -> float:
        """The share of words before the first wrong one."""
        right = 0
        for found, wanted in zip(output.split(), item.references, strict=False):
            if found != wanted:
                break
            right += 1
        return right / len(item.references)


@dataclasses.dataclass(frozen=True)
class RepeatedWords(TextQuestions):
    """The same word over and over, one of them another: to be copied exactly, as in Context Rot (Chroma, 2025).

    A unit is a word; half of the length is left for the copy. The score is 1 minus the edit distance in words over the longer
    number of words. A guess is the common word as often as there are words, which scores nearly 1.
    """

    answer_tokens = 16
    units_per_1024 = 96

    def least(self, length: int) -> int:
        """A few words."""
        return 8

    def new_tokens(self, length: int) -> int:
        """Half of the length."""
        return length // 2

    def answer(self, sample: Sample) -> str:
        """The words."""
        return " " + " ".join(sample.references)

    def compose(self, draw: Draw, units: int) -> Sample:
        """Both words are drawn anew."""
        common, other = draw.rng.sample(words.listed("noun"), 2)
        listed = [common] * units
        listed[random.Random(draw.rng.random()).randrange(units)] = other
        prompt = f"Copy the words below exactly, and write nothing else.\n{' '.join(listed)}"
        return Sample(prompt, "\n", tuple(listed))

    def guess(self, items: Sequence[Item]) -> float:
        """All words right but one."""
        return sum(1 - 1 / len(item.references) for item in items) / len(items)

    def score(self, item: Item, output: str) -> float:
        """How close the copy is."""
        said = output.split()
        return 1 - edits(said, item.references) / max(len(said), len(item.references), 1)
