"""InfiniteBench's generated tasks beside the pass key, digits and pairs (Zhang et al., 2402.13718): numbers, sums and code."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from lcx.evals.base import Item
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import first_integer, integers
from lcx.evals.text.questions import Draw, TextQuestions

ASKED = {
    "largest": lambda rising: rising[-1],
    "second largest": lambda rising: rising[-2],
    "third largest": lambda rising: rising[-3],
    "smallest": lambda rising: rising[0],
    "second smallest": lambda rising: rising[1],
    "third smallest": lambda rising: rising[2],
    "median": lambda rising: rising[(len(rising) - 1) // 2],
}
"""What is asked of a list, and how it is found in the sorted one; of an even number the lower median."""

TERMS = 20
"""How many of the last values of a sum are asked for: the benchmark's own task asks for all 30,000."""


@dataclasses.dataclass(frozen=True)
class FindNumber(TextQuestions):
    """A list of numbers from 0 to 99 of which one is asked for; a unit is a number.

    The largest, or the smallest, is drawn from a range of 21: a guess that knows this is right once in 21, the answer to another
    question half as often.
    """

    answer_tokens = 8
    units_per_1024 = 256

    def least(self, length: int) -> int:
        """Enough for the third of either end."""
        return 8

    def compose(self, draw: Draw, units: int) -> Sample:
        """The kinds of question take turns."""
        what = tuple(ASKED)[draw.number % len(ASKED)]
        rng = random.Random(draw.rng.random())
        low, high = (draw.rng.randrange(20), 99) if "small" in what else (0, draw.rng.randrange(79, 100))
        numbers = [rng.randint(low, high) for _ in range(units)]
        # The bound itself is in the list.
        numbers[draw.rng.randrange(units)] = low if "small" in what else high
        prompt = f"Find the {what} number in the list below.\n{numbers}\nWhat is the {what} number in the list above?"
        return Sample(prompt, f" The {what} number in the list is:", (str(ASKED[what](sorted(numbers))),))

    def guess(self, items: Sequence[Item]) -> float:
        """What answers to other questions score."""
        return self.by_others(items)

    def score(self, item: Item, output: str) -> float:
        """1 if the first number of the output is the one that was asked for."""
        return float(first_integer(output) == item.references[0])


@dataclasses.dataclass(frozen=True)
class RunningSum(TextQuestions):
    """A long sum whose value stays between 0 and 99; its last values are asked for. A unit is a term.

    The score is the share of values before the first wrong one. Chance is that of guessing a value of two digits.
    """

    answer_tokens = 100
    units_per_1024 = 200

    def least(self, length: int) -> int:
        """The values that are asked for."""
        return TERMS + 1

    def answer(self, sample: Sample) -> str:
        """The values as a list."""
        return f" {', '.join(sample.references)}]"

    def compose(self, draw: Draw, units: int) -> Sample:
        """A running value from the first term on."""
        value = draw.rng.randrange(100)
        text, values = [str(value)], [value]
        for _ in range(units):
            term = draw.rng.randint(-value, 99 - value)
            value += term
            text.append(f"{'-' if term < 0 else '+'} {abs(term)}")
            values.append(value)
        prompt = (
            f"Work out the sum below from left to right.\n{' '.join(text)}\n"
            f"List the values of the sum after each of its last {TERMS} terms."
        )
        return Sample(prompt, " The values are [", tuple(map(str, values[-TERMS:])))

    def score(self, item: Item, output: str) -> float:
        """The share of values that are right up to the first wrong one."""
        right = 0
        for found, wanted in zip(integers(output), item.references, strict=False):
            if found != int(wanted):
                break
            right += 1
        return right / len(item.references)


@dataclasses.dataclass(frozen=True)
class RunCode(TextQuestions):
    """Small functions that each call another and add a number; the value of a call through `levels` of them is asked for.

    A unit is a function. The last word of the output must be the number. A guess is the value of another call.
    """

    levels: int = 4

    answer_tokens = 8
    units_per_1024 = 12

    @property
    def chance(self) -> float:
        """That two calls have one value: an argument of 21, and a number of 30 for each level."""
        shares = np.full(21, 1 / 21)
        for _ in range(self.levels):
            shares = np.convolve(shares, np.full(30, 1 / 30))
        return float(np.sum(shares**2))

    def least(self, length: int) -> int:
        """Those that are called."""
        return self.levels

    def compose(self, draw: Draw, units: int) -> Sample:
        """Each level's functions call functions of the next, so that no call comes back."""
        rng, distinct = random.Random(draw.rng.random()), words.Distinct()
        names = [distinct(lambda: f"func_{rng.randrange(10 * units + 10)}") for _ in range(units)]
        level = [i % self.levels for i in range(units)]
        below = {k: [i for i in range(units) if level[i] == k + 1] for k in range(self.levels)}
        added = [rng.randint(-12, 17) for _ in range(units)]
        calls = [rng.choice(below[level[i]]) if below[level[i]] else None for i in range(units)]
        signs = [f"{'+' if x >= 0 else '-'} {abs(x)}" for x in added]
        inner = ["x" if called is None else f"{names[called]}(x)" for called in calls]
        lines = [f"def {names[i]}(x):\n    return {inner[i]} {signs[i]}" for i in range(units)]
        argument = draw.rng.randint(-10, 10)
        asked: int | None = draw.rng.choice([i for i in range(units) if level[i] == 0])
        name, value = names[asked], argument
        while asked is not None:
            value, asked = value + added[asked], calls[asked]
        rng.shuffle(lines)
        code = "\n\n".join(lines)
        prompt = f"Read the Python code below.\n\n{code}\n\nWhat does {name}({argument}) return? Answer with the number alone."
        return Sample(prompt, f" {name}({argument}) returns", (str(value),))

    def score(self, item: Item, output: str) -> float:
        """1 if the last word of the first line is the number."""
        said = output.strip().split("\n")[0].split()
        return float(bool(said) and said[-1].strip(".`") == item.references[0])
