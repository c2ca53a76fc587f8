"""State over a session: variables that change from turn to turn, and a list that grows and shrinks (Michelangelo, 2409.12640)."""

from __future__ import annotations

import dataclasses
import random

from lcx.evals.base import Item
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import integers
from lcx.evals.text.questions import Draw, TextQuestions

COLOURS = ("red", "green", "blue", "yellow")


@dataclasses.dataclass(frozen=True)
class SessionState(TextQuestions):
    """Four counters that turns of a chat set, raise, lower, copy and swap; at the end all four are asked for.

    A unit is a turn of the user with the model's reply. The score is 1 only if all four are right. Chance is about 0.
    """

    counts = "turns"
    answer_tokens = 24
    units_per_1024 = 16

    def compose(self, draw: Draw, units: int) -> Sample:
        """Values stay between 0 and 99."""
        rng = draw.rng
        state = {colour: rng.randrange(100) for colour in COLOURS}
        told = ", ".join(f"{colour} = {value}" for colour, value in state.items())
        turns = [f"Keep count for me. There are four counters: {told}. I will tell you how they change.", "Ready."]
        for _ in range(units):
            turns += [self._change(rng, state), "Noted."]
        prompt = f"What are the values of {', '.join(COLOURS[:-1])} and {COLOURS[-1]} now? Give the four numbers in this order."
        return Sample(prompt, " The values are:", tuple(str(state[colour]) for colour in COLOURS), turns=tuple(turns))

    def _change(self, rng: random.Random, state: dict[str, int]) -> str:
        one, other = rng.sample(COLOURS, 2)
        kind = rng.choice(("set", "raise", "lower", "copy", "swap"))
        if kind == "raise" and state[one] < 99:
            by = rng.randint(1, min(9, 99 - state[one]))
            state[one] += by
            return f"Raise {one} by {by}."
        if kind == "lower" and state[one] > 0:
            by = rng.randint(1, min(9, state[one]))
            state[one] -= by
            return f"Lower {one} by {by}."
        if kind == "copy":
            state[one] = state[other]
            return f"Set {one} to what {other} is."
        if kind == "swap":
            state[one], state[other] = state[other], state[one]
            return f"Swap {one} and {other}."
        state[one] = rng.randrange(100)
        return f"Set {one} to {state[one]}."

    def score(self, item: Item, output: str) -> float:
        """1 if the first numbers of the output are the four values in their order."""
        return float(integers(output)[: len(item.references)] == [int(value) for value in item.references])


@dataclasses.dataclass(frozen=True)
class LatentList(TextQuestions):
    """A Python list that starts empty, and operations on it; asked for are its elements at the end, at most `most` of them.

    A unit is an operation. The score is 1 only if all elements are right. Chance is about 0.
    """

    most: int = 6

    counts = "operations"
    answer_tokens = 24
    units_per_1024 = 40

    def answer(self, sample: Sample) -> str:
        """The rest of the list, as Python writes it."""
        return ", ".join(sample.references) + "]"

    def least(self, length: int) -> int:
        """Something to ask for."""
        return 4

    def compose(self, draw: Draw, units: int) -> Sample:
        """The list is never empty at the end."""
        rng, values, lines = draw.rng, [], []
        for left in reversed(range(units)):
            lines.append(self._operation(rng, values, last=left == 0))
        listed = "\n".join(lines)
        prompt = f"A Python list is changed by the statements below, one after the other.\nx = []\n{listed}\nWhat is x at the end?"
        return Sample(prompt, " x = [", tuple(map(str, values)))

    def _operation(self, rng: random.Random, values: list[int], last: bool) -> str:
        kind = rng.choice(("append", "insert", "pop", "remove", "reverse", "sort", "set"))
        value = rng.randrange(100)
        if not values or (kind == "append" and len(values) < self.most) or (last and len(values) < 2):
            values.append(value)
            return f"x.append({value})"
        if kind == "insert" and len(values) < self.most:
            at = rng.randrange(len(values))
            values.insert(at, value)
            return f"x.insert({at}, {value})"
        if kind == "pop" and len(values) > 1:
            at = rng.randrange(len(values))
            values.pop(at)
            return f"x.pop({at})"
        if kind == "remove" and len(values) > 1:
            value = rng.choice(values)
            values.remove(value)
            return f"x.remove({value})"
        if kind == "reverse":
            values.reverse()
            return "x.reverse()"
        if kind == "sort":
            values.sort()
            return "x.sort()"
        at = rng.randrange(len(values))
        values[at] = value
        return f"x[{at}] = {value}"

    def score(self, item: Item, output: str) -> float:
        """1 if the numbers up to the closing bracket are the list's."""
        return float(integers(output.partition("]")[0]) == [int(value) for value in item.references])
