"""RULER's eight needle tasks (Hsieh et al., 2404.06654): sentences that give keys their values, in one of three haystacks."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, Literal

from lcx.evals.base import Materials
from lcx.evals.text import noise, prose, words
from lcx.evals.text.formats import Sample
from lcx.evals.text.prose import Prose
from lcx.evals.text.questions import Draw, TextQuestions

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percentages of the sentences of an essay before which a needle may stand."""

FAITHFUL_SEED = 42


@dataclasses.dataclass(frozen=True)
class HiddenValues(TextQuestions):
    """`keys` needles, or as many as `queries` where that is more, each key with `values` values; all values of the queried keys are
    asked for.

    The haystack is `noise`, an `essay` (any prose), or other `needles`. A unit is a sentence of noise, a word of an essay, or a
    needle. Chance is that of guessing a number of seven digits, or an identifier.
    """

    haystack: Literal["noise", "essay", "needles"] = "noise"
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    prose: Prose | None = None

    answer_tokens = 128
    units_per_1024 = 64

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The prose of an essay."""
        return {"prose": prose.load(materials.given("prose"))} if settings["haystack"] == "essay" else {}

    def least(self, length: int) -> int:
        """A place for every needle."""
        needles = max(self.keys, self.queries) * self.values
        return {"noise": noise.count(needles), "essay": 1, "needles": needles}[self.haystack]

    def step(self, length: int) -> int:
        """500 words, or 25 lines (5 below 4,096 tokens)."""
        lines = 5 if length < 4096 else 25
        return {"noise": noise.count(lines), "essay": 500, "needles": lines}[self.haystack]

    def compose(self, draw: Draw, units: int) -> Sample:
        """The needles first, so that they are the same whatever the size."""
        rng, distinct = draw.rng, words.Distinct()
        needles = [
            (key, [distinct(self._value, rng) for _ in range(self.values)])
            for key in (distinct(self._key, rng) for _ in range(max(self.keys, self.queries)))
        ]
        asked = rng.sample(needles, self.queries)
        lines = [self._line(key, value) for key, values in needles for value in values]
        (random.Random(FAITHFUL_SEED) if self.settings.faithful else rng).shuffle(lines)
        context, depths = self._hide(rng, lines, units, distinct)
        references = tuple(value for _, values in asked for value in values)
        query = _listed([key for key, _ in asked])
        one = len(references) == 1
        what = f"special magic {self.value[:-1] if one else self.value}"
        prompt = (
            f"{f'A {what} is' if one else f'Some {what} are'} hidden in the text below. Keep {'it' if one else 'them'} in mind: "
            f"you will be asked for {'it' if one else 'them'} afterwards.\n{context}\n"
            f"What {'is' if one else 'are all'} the {what} for {query} that the text above mentions?"
        )
        prefix = f" The {what} for {query} that the text above mentions {'is' if one else 'are'}"
        depth = depths[lines.index(self._line(asked[0][0], references[0]))] if one else None
        return Sample(prompt, prefix, references, depth)

    def _hide(self, rng: random.Random, lines: list[str], units: int, distinct: words.Distinct) -> tuple[str, list[float]]:
        """The context, and the depth of each line."""
        if self.haystack == "essay":
            assert self.prose is not None
            start = 0 if self.settings.faithful else rng.randrange(len(self.prose))
            depths = sorted(rng.sample(DEPTHS, len(lines)))
            hay = self.prose.take(start, units)
            places, between = [len(hay) * depth // 100 for depth in depths], " "
        else:
            if self.haystack == "noise":
                hay = noise.lines(units)
            else:
                hay = [self._line(distinct(self._key, rng), distinct(self._value, rng)) for _ in range(units)]
            # A generator of its own, whose draws do not depend on how many lines were drawn before.
            places, between = sorted(random.Random(rng.random()).sample(range(len(hay)), len(lines))), "\n"
        depths = [place / len(hay) for place in places]
        for place, line in zip(reversed(places), reversed(lines), strict=True):
            hay.insert(place, line)
        return between.join(hay), depths

    def _line(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _key(self, rng: random.Random) -> str:
        return words.key(rng) if self.key == "words" else words.identifier(rng)

    def _value(self, rng: random.Random) -> str:
        return words.number(rng) if self.value == "numbers" else words.identifier(rng)


def _listed(names: list[str]) -> str:
    """`a`, or `a, b, c, and d`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
