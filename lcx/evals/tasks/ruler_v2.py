"""The tasks of RULER's second version that need no files (NVIDIA NeMo Skills, `ruler2`), and the n-th of four identical keys."""

from __future__ import annotations

import dataclasses

from lcx.evals.base import Item
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import cleaned, word_error_rate
from lcx.evals.text.questions import Draw, TextQuestions

ORDINALS = ("first", "second", "third", "fourth")


@dataclasses.dataclass(frozen=True)
class BasicNeedles(TextQuestions):
    """Lines that give words numbers of ten digits, each word `values` times; all values of a word are asked for, or with `nth` one.

    There is no answer prefix. A unit is a line. What follows `</think>` and the last "Answer:" is scored: the mean over
    references of 1 if it is contained and else 1 minus the word error rate. Chance is that of guessing ten digits.
    """

    values: int = 1
    nth: bool = False

    answer_tokens = 128
    units_per_1024 = 20

    def least(self, length: int) -> int:
        """The lines of one word."""
        return self.values

    def compose(self, draw: Draw, units: int) -> Sample:
        """The lines of all words in one random order."""
        rng, distinct = draw.rng, words.Distinct()
        keys = [distinct(words.key, rng) for _ in range(units // self.values)]
        # One more word has the lines that are left over.
        named = [key for key in keys for _ in range(self.values)] + [distinct(words.key, rng)] * (units % self.values)
        lines = [(key, distinct(words.number, rng, 10)) for key in named]
        rng.shuffle(lines)
        asked, which = rng.choice(keys), rng.randrange(self.values)
        found = [value for key, value in lines if key == asked]
        listed = "\n".join(f"The number of {key} is {value}." for key, value in lines)
        if self.nth:
            what, found = f"What is the {ORDINALS[which]} number of {asked} in the text above?", [found[which]]
        elif self.values > 1:
            what = f"What are all {self.values} numbers of {asked} in the text above?"
        else:
            what = f"What is the number of {asked} in the text above?"
        prompt = f"Read the text below and answer the question after it.\n{listed}\n{what} Write them behind 'Answer:'."
        return Sample(prompt, "", tuple(found))

    def answer(self, sample: Sample) -> str:
        """Behind the word."""
        return f"Answer: {', '.join(sample.references)}"

    def score(self, item: Item, output: str) -> float:
        """The mean over references."""
        said = cleaned(output.rpartition("</think>")[2].rpartition("Answer:")[2])
        scores = [1.0 if x in said else max(0.0, 1 - word_error_rate(said.split(), [x])) for x in item.references]
        return sum(scores) / len(scores)
