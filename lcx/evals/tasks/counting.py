"""Counting over a log of lines, as OOLONG asks (Bertsch et al., 2511.02817), with classes that the prompt defines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lcx.evals.base import Item
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import first_integer, near
from lcx.evals.text.questions import Draw, TextQuestions

USERS = ("Ada", "Ben", "Cleo", "Dan")
CLASSES, MEMBERS = ("alpha", "beta", "gamma", "delta"), 5


@dataclasses.dataclass(frozen=True)
class LabelCounts(TextQuestions):
    """Lines with a date, a user and a word of one of four classes; asked is how many lines of a user, or of all, are of a class.

    A unit is a line. The score is 0.75 to the power of the error. A guess is the count of another log of the same length: it scores
    about a third at 2,048 bytes, and less the longer the log.
    """

    answer_tokens = 8
    units_per_1024 = 40

    def least(self, length: int) -> int:
        """A few lines."""
        return 8

    def compose(self, draw: Draw, units: int) -> Sample:
        """Shares of users and classes differ from sample to sample."""
        rng = draw.rng
        drawn = rng.sample(words.listed("noun"), len(CLASSES) * MEMBERS)
        members = {name: drawn[i * MEMBERS : (i + 1) * MEMBERS] for i, name in enumerate(CLASSES)}
        weights, target = [rng.uniform(0.2, 1) for _ in CLASSES], rng.choice(CLASSES)
        user = rng.choice((*USERS, None))
        lines, count = [], 0
        for i in range(units):
            who, what = rng.choice(USERS), rng.choices(CLASSES, weights)[0]
            count += what == target and user in (None, who)
            lines.append(f"Day {i + 1} | {who} | {rng.choice(members[what])}")
        defined = "\n".join(f"{name}: {', '.join(listed)}" for name, listed in members.items())
        listed = "\n".join(lines)
        whose = "of all users" if user is None else f"of the user {user}"
        prompt = (
            f"There are four classes of words:\n{defined}\nEach line of the log below has a day, a user and a word.\n{listed}\n"
            f"How many lines {whose} have a word of the class {target}?"
        )
        return Sample(prompt, " Answer:", (str(count),))

    def guess(self, items: Sequence[Item]) -> float:
        """What the counts of other logs score."""
        return self.by_others(items)

    def score(self, item: Item, output: str) -> float:
        """1 for the count, less by a quarter for each that it is off; 0 without a number."""
        found = first_integer(output)
        return 0.0 if found is None else near(found, item.references[0])
