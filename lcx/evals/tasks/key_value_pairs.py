"""Values of keys in a long JSON object, over length and depth.

As in Lost in the Middle (Liu et al., 2307.03172), and with two solved examples as in HELMET (Yen et al., 2410.02694).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lcx.evals.base import Materials
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.questions import Draw, TextQuestions


@dataclasses.dataclass(frozen=True)
class KeyValuePairs(TextQuestions):
    """Random identifiers for keys and values, one of them asked for at each of `evals.depths`; a unit is a pair.

    All depths are asked about one object, which a model has to read once. With `demonstrations`, that many of its pairs are asked
    for and answered after it, before the question. Chance is that of guessing an identifier.
    """

    grid: tuple[float, ...]
    demonstrations: int = 0

    version = 2
    answer_tokens = 100
    units_per_1024 = 10
    one_text = True

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's depths."""
        return {"grid": materials.config.depths}

    @property
    def depths(self) -> Sequence[float | None]:
        """Those of the evaluation."""
        return self.grid

    def least(self, length: int) -> int:
        """The pair that is asked for, and those of the demonstrations."""
        return 1 + self.demonstrations

    def compose(self, draw: Draw, units: int) -> Sample:
        """Demonstrations are drawn from the pairs that are not asked for."""
        distinct = words.Distinct()
        pairs = [(distinct(words.identifier, draw.rng), distinct(words.identifier, draw.rng)) for _ in range(units)]
        at = round((draw.depth or 0.0) * (units - 1))
        shown = draw.rng.sample([i for i in range(units) if i != at], self.demonstrations)
        listed = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
        solved = "".join(f'\n\nKey: "{pairs[i][0]}"\nCorresponding value: {pairs[i][1]}' for i in shown)
        prompt = f'Find the value of a key in the JSON object below.\n\nJSON data:\n{{{listed}}}{solved}\n\nKey: "{pairs[at][0]}"'
        return Sample(prompt, "\nCorresponding value:", (pairs[at][1],), draw.depth)
