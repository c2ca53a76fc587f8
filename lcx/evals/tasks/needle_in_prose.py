"""Needles in natural sentences, over length and depth: a sentence in prose, and a pass key in noise.

The pass key is that of Mohtashami & Jaggi (2305.16300) as InfiniteBench (2402.13718) asks for it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lcx.evals.base import Item, Materials
from lcx.evals.text import noise, prose, words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import first_integer
from lcx.evals.text.prose import Prose
from lcx.evals.text.questions import Draw, TextQuestions


@dataclasses.dataclass(frozen=True)
class NeedleInProse(TextQuestions):
    """One sentence that says which number somebody chose, at each of `evals.depths`; a unit is a word of prose.

    Chance is that of guessing a number of seven digits.
    """

    prose: Prose
    grid: tuple[float, ...]

    answer_tokens = 16
    units_per_1024 = 128

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's prose and depths."""
        return {"prose": prose.load(materials.config.questions.prose), "grid": materials.config.depths}

    @property
    def depths(self) -> Sequence[float | None]:
        """Those of the evaluation."""
        return self.grid

    def compose(self, draw: Draw, units: int) -> Sample:
        """The needle stands before the sentence that begins at the depth."""
        adjective, noun = words.key(draw.rng).split("-")
        value = words.number(draw.rng)
        hay = self.prose.take(draw.rng.randrange(len(self.prose)), units)
        # The end of a sentence that is closest to the depth, in characters.
        ends = [0, *itertools.accumulate(len(sentence) + 1 for sentence in hay)]
        place = min(range(len(ends)), key=lambda i: abs(ends[i] - (draw.depth or 0.0) * ends[-1]))
        hay.insert(place, f"The keeper of the {adjective} {noun} chose the number {value}.")
        prompt = (
            f"Read the text below; a question about it follows.\n{' '.join(hay)}\n"
            f"Question: Which number did the keeper of the {adjective} {noun} choose?"
        )
        return Sample(prompt, f" Answer: The keeper of the {adjective} {noun} chose the number", (value,), draw.depth)


@dataclasses.dataclass(frozen=True)
class Passkey(TextQuestions):
    """A pass key in noise, at each of `evals.depths`, of five digits, or with `repeats` of ten, five of which repeat one before.

    A unit is a sentence of noise. Found if the first number of the output is the key. Chance is that of guessing its digits.
    """

    grid: tuple[float, ...]
    repeats: bool = False

    answer_tokens = 12
    units_per_1024 = 64

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's depths."""
        return {"grid": materials.config.depths}

    @property
    def depths(self) -> Sequence[float | None]:
        """Those of the evaluation."""
        return self.grid

    def compose(self, draw: Draw, units: int) -> Sample:
        """The line with the key stands before the line of noise that begins at the depth."""
        digits = list(words.number(draw.rng, 5))
        for _ in range(5 * self.repeats):
            at = draw.rng.randrange(len(digits))
            digits.insert(at, digits[at])
        value, what = "".join(digits), "sequence of digits" if self.repeats else "pass key"
        lines = noise.lines(units)
        lines.insert(round((draw.depth or 0.0) * len(lines)), f"The {what} is {value}. Remember it. {value} is the {what}.")
        context = "\n".join(lines)
        prompt = (
            f"Something important is hidden in a lot of irrelevant text. Find it and memorise it: I will ask you for the {what}.\n"
            f"{context}\nWhat is the {what}?"
        )
        return Sample(prompt, f" The {what} is", (value,), draw.depth)

    def score(self, item: Item, output: str) -> float:
        """1 if the first number is the key."""
        return float(first_integer(output) == item.references[0])
