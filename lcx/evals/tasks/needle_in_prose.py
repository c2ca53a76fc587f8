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
    """Sentences that say which number somebody chose, one at each of `evals.depths`; one of them is asked for.

    A unit is a word of prose.

    All depths are asked about one text, which a model has to read once, and the other sentences distract from the one that is
    asked for. A `single` one has the text to itself, as in Kamradt's needle in a haystack: the same prose for all depths, read
    anew from the needle on. Chance is that of guessing a number of seven digits.
    """

    prose: Prose
    grid: tuple[float, ...]
    single: bool = False

    version = 2
    answer_tokens = 16
    units_per_1024 = 128
    one_text = True

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's prose and depths."""
        return {"prose": prose.load(materials.given("prose")), "grid": materials.config.depths}

    @property
    def depths(self) -> Sequence[float | None]:
        """Those of the evaluation."""
        return self.grid

    def compose(self, draw: Draw, units: int) -> Sample:
        """Each needle stands before the sentence that begins at its depth."""
        distinct = words.Distinct()
        named = [distinct(words.key, draw.rng).replace("-", " ") for _ in self.grid]
        values = [distinct(words.number, draw.rng) for _ in self.grid]
        hay = self.prose.take(draw.rng.randrange(len(self.prose)), units)
        # The ends of sentences, in characters; needles are set in from behind, so that places before them stay.
        ends = [0, *itertools.accumulate(len(sentence) + 1 for sentence in hay)]
        places = [min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1])) for depth in self.grid]
        needles = list(zip(places, named, values, strict=True))
        asked = needles[self.grid.index(draw.depth)]
        for place, name, value in [asked] if self.single else sorted(needles, reverse=True):
            hay.insert(place, f"The keeper of the {name} chose the number {value}.")
        _, name, value = asked
        prompt = (
            f"Read the text below; a question about it follows.\n{' '.join(hay)}\n"
            f"Question: Which number did the keeper of the {name} choose?"
        )
        return Sample(prompt, f" Answer: The keeper of the {name} chose the number", (value,), draw.depth)


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
