"""Many-shot in-context learning of classes that no model knows, as in HELMET (2410.02694) and Bertsch et al. (2405.00200)."""

from __future__ import annotations

import dataclasses
import random

from lcx.evals.base import Item
from lcx.evals.text import words
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import first_integer
from lcx.evals.text.questions import Draw, TextQuestions

MARKERS, FILLERS, NEUTRAL = 8, 4, 12
"""Words that tell a class, of which a text holds one; words beside it, from a few that all classes share and that tell nothing."""


@dataclasses.dataclass(frozen=True)
class ManyShot(TextQuestions):
    """Texts of five words, one of which tells the class, with a number for a label; a unit is a labelled text.

    Shots are balanced: rounds of one of each class in random order, with new labels for every sample. Chance is one in `classes`.
    """

    classes: int = 6

    counts = "shots"
    answer_tokens = 20
    units_per_1024 = 24

    @property
    def chance(self) -> float:
        """One in the number of classes."""
        return 1 / self.classes

    def least(self, length: int) -> int:
        """One round."""
        return self.classes

    def compose(self, draw: Draw, units: int) -> Sample:
        """Words and labels first; the word that tells the class of the question has been shown if there is a shot that can."""
        rng = draw.rng
        drawn = rng.sample(words.vocabulary(), self.classes * MARKERS + NEUTRAL)
        markers = [drawn[k * MARKERS : (k + 1) * MARKERS] for k in range(self.classes)]
        fillers, labels = drawn[self.classes * MARKERS :], rng.sample(range(self.classes), self.classes)
        asked, later = rng.randrange(self.classes), random.Random(rng.random())

        def text(k: int, marker: str | None = None) -> str:
            chosen = [marker or later.choice(markers[k]), *later.sample(fillers, FILLERS)]
            later.shuffle(chosen)
            return " ".join(chosen)

        question = text(asked, marker=markers[asked][0])
        count = -(-units // self.classes)
        rounds = [k for _ in range(count) for k in later.sample(range(self.classes), self.classes)][:units]
        shots = [(text(k), labels[k]) for k in rounds]
        # The first shot of the class shows the word.
        first = next((i for i, k in enumerate(rounds) if k == asked), None)
        if first is not None:
            shots[first] = (text(asked, marker=markers[asked][0]), labels[asked])
        listed = "\n".join(f"text: {shot}\nlabel: {label}" for shot, label in shots)
        prompt = (
            f"Each text below has a label from 0 to {self.classes - 1}. Learn from the examples which label belongs to which "
            f"texts, and label the last text.\n{listed}\ntext: {question}"
        )
        return Sample(prompt, "\nlabel:", (str(labels[asked]),))

    def score(self, item: Item, output: str) -> float:
        """1 if the first number of the output is the label."""
        return float(first_integer(output) == item.references[0])
