"""RULER's variable tracking (Hsieh et al., 2404.06654): a chain of assignments, scattered over noise, followed to its end."""

from __future__ import annotations

import dataclasses
import functools
import random

from lcx.evals.text import noise, words
from lcx.evals.text.fit import largest
from lcx.evals.text.formats import Sample
from lcx.evals.text.questions import Draw, TextQuestions

EXAMPLE_TOKENS = 500
"""Most tokens of the solved example that every prompt begins with; an eighth of a length below 4,096."""


@dataclasses.dataclass(frozen=True)
class VariableTracking(TextQuestions):
    """One chain of `hops` assignments after the first, whose variables are all asked for; a unit is a sentence of noise.

    The prefix says how many there are, as RULER's does. Chance is that of guessing names of five letters.
    """

    hops: int = 4

    version = 2
    answer_tokens = 30
    units_per_1024 = 64

    def least(self, length: int) -> int:
        """A line between any two assignments."""
        return noise.count(self.hops + 1)

    def step(self, length: int) -> int:
        """10 lines, or 5 below 4,096 tokens."""
        return noise.count(5 if length < 4096 else 10)

    def answer(self, sample: Sample) -> str:
        """The names with spaces between them, as in the example."""
        return " " + " ".join(sample.references)

    def compose(self, draw: Draw, units: int) -> Sample:
        """The chain first, so that it is the same whatever the size."""
        rng, distinct = draw.rng, words.Distinct()
        example_rng = random.Random(rng.random())
        solved_value, value = (distinct(lambda: str(rng.randrange(10000, 99999))) for _ in range(2))
        example = self.chain(example_rng, example_units(self, draw.length), letters=3, value=solved_value)
        asked = self.chain(rng, units, letters=5, value=value)
        solved = example.prompt + example.prefix + self.answer(example)
        return asked._replace(prompt=f"{solved}\n\n{asked.prompt}")

    def chain(self, rng: random.Random, units: int, letters: int, value: str) -> Sample:
        """A question about a new chain, whose first variable has the value."""
        distinct = words.Distinct(("VAR", *noise.TEXT.upper().replace(".", "").split()))
        names = tuple(distinct(words.letters, rng, letters) for _ in range(self.hops + 1))
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False))]
        lines = noise.lines(units)
        places = range(len(lines) + 1)
        # A short example has fewer places than assignments.
        places = sorted(rng.sample(places, len(chain)) if len(chain) <= len(places) else rng.choices(places, k=len(chain)))
        for place, line in zip(reversed(places), reversed(chain), strict=True):
            lines.insert(place, line)
        prompt = (
            "Follow the chain of variable assignments that is hidden in the text below, and memorise it.\n\n"
            + "\n".join(lines)
            + f"\nQuestion: Find all variables that are assigned the value {value}, directly or through other variables, "
            "in the text above."
        )
        found = f"{len(names)} variables are assigned the value {value}, they are:"
        prefix = f" Answer: By the chain of assignments in the text above, {found}"
        return Sample(prompt, prefix, names)


@functools.lru_cache(maxsize=64)
def example_units(task: VariableTracking, length: int) -> int:
    """Sentences of noise in the example of every prompt of a length."""
    budget, least = min(EXAMPLE_TOKENS, length // 8), noise.count(1)

    def compose(units: int) -> tuple[int, None]:
        sample = task.chain(random.Random(0), units, letters=3, value="12345")
        return len(task.format.tokenizer.encode(sample.prompt + sample.prefix + task.answer(sample))), None

    found = largest(compose, budget, least, least)
    return found[0] if found else least
