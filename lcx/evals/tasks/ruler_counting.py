"""RULER's two aggregation tasks (Hsieh et al., 2404.06654): which words of a list, or of a coded text, occur most often?"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import string
from typing import NamedTuple

from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.questions import Draw, TextQuestions

FAITHFUL_SEED = 42
COMMON = 10
"""Words that are asked for."""


class Occurrences(NamedTuple):
    """How often common and other words occur, the number of words in the example, and how often those occur."""

    often: int
    seldom: int
    example_words: int
    example_often: int
    example_seldom: int


LARGE, SMALL = Occurrences(30, 3, 40, 10, 3), Occurrences(6, 1, 20, 3, 1)


@dataclasses.dataclass(frozen=True)
class CommonWords(TextQuestions):
    """A numbered list in which ten words occur more often than the others, after a solved example; a unit is a word.

    The small form of RULER's lengths below 4,096 is used wherever the large one would not leave half of the length to the words
    that are not asked for. Chance is that of guessing words of the list.
    """

    version = 2
    answer_tokens = 120
    units_per_1024 = 32

    def least(self, length: int) -> int:
        """Twice the words that are asked for."""
        return 2 * COMMON

    def step(self, length: int) -> int:
        """Ten words."""
        return 10

    def answer(self, sample: Sample) -> str:
        """Numbered, as in the example."""
        return " " + _numbered(sample.references)

    def compose(self, draw: Draw, units: int) -> Sample:
        """The words that are asked for are part of no other."""
        return self.sized(draw.rng, units, occurrences(self, draw.length))

    def sized(self, rng: random.Random, units: int, how: Occurrences) -> Sample:
        """A sample in the large or the small form."""
        drawn = words.unique_words(rng, units + how.example_words)
        shown = drawn[: how.example_words]
        # Of so few words hardly ten would be part of none of a long list.
        example = self._asked(rng, shown, shown, how.example_often, how.example_seldom)
        asked = self._asked(rng, drawn[how.example_words :], drawn, how.often, how.seldom)
        solved = example.prompt + example.prefix + self.answer(example)
        return asked._replace(prompt=f"{solved}\n{asked.prompt}")

    def _asked(self, rng: random.Random, listed: list[str], all_words: list[str], often: int, seldom: int) -> Sample:
        common = listed[:COMMON] if self.settings.faithful else words.not_contained(listed, COMMON, all_words)
        chosen = set(common)
        repeated = common * often + [word for word in listed if word not in chosen] * seldom
        (random.Random(FAITHFUL_SEED) if self.settings.faithful else rng).shuffle(repeated)
        prompt = (
            "Below is a numbered list of words, some of which occur more often than the others. Memorise those that occur most "
            "often.\n"
            f"{_numbered(repeated)}\nQuestion: What are the {COMMON} most common words in the above list?"
        )
        return Sample(prompt, f" Answer: The top {COMMON} words that occur most often in the list are:", tuple(common))


@functools.lru_cache(maxsize=64)
def occurrences(task: CommonWords, length: int) -> Occurrences:
    """The large form, or the small one."""
    if task.settings.faithful:
        return SMALL if length < 4096 else LARGE
    sample = task.sized(random.Random(0), task.least(length), LARGE)
    return LARGE if len(task.format.encode(task.format.text(sample))) <= length // 2 else SMALL


@dataclasses.dataclass(frozen=True)
class FrequentWords(TextQuestions):
    """Coded words whose frequencies fall off as the square of their rank, the first of them dots; ranks two to four are asked for.

    A unit is a word of the text. Chance is that of guessing coded words.
    """

    answer_tokens = 50
    units_per_1024 = 128
    alpha = 2.0

    def least(self, length: int) -> int:
        """Enough that the fourth word occurs more often than the fifth."""
        return 128

    def step(self, length: int) -> int:
        """A 32nd of the length; sizes are a sixth of the length and such steps more or less."""
        return max(1, length // 32)

    def compose(self, draw: Draw, units: int) -> Sample:
        """The coded words first, so that they are the same whatever the size."""
        rng, distinct = draw.rng, words.Distinct()
        vocabulary = max(8, (draw.length - 50) // 50)
        drawn = [distinct(words.letters, rng, 6, string.ascii_lowercase) for _ in range(vocabulary)]
        # The dots are a word of the vocabulary.
        coded = ["...", *drawn][:vocabulary]
        if self.settings.faithful:
            units += draw.length // 6 % self.step(draw.length)
        text: list[str] = []
        for rank, word in enumerate(coded, 1):
            text += [word] * int(units * rank**-self.alpha / ZETA)
        (random.Random(FAITHFUL_SEED) if self.settings.faithful else rng).shuffle(text)
        prompt = (
            "Read the coded text below and keep track of how often each coded word occurs. Find the three coded words that occur "
            "most often. Ignore the dots '....' and give no explanation.\n"
            f"{' '.join(text)}\nQuestion: What are the three most frequently appearing words in the coded text above?"
        )
        prefix = " Answer: According to the coded text above, the three most frequently appearing words are:"
        return Sample(prompt, prefix, tuple(coded[1:4]))


ZETA = math.pi**2 / 6
"""Riemann's zeta function at 2."""


def _numbered(listed: list[str] | tuple[str, ...]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
