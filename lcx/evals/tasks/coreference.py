"""One of several turns alike, to be repeated word for word, as in MRCR (Vodrahalli et al., 2409.12640; OpenAI, 2025)."""

from __future__ import annotations

import dataclasses
import difflib
import random
import string
from typing import Any

from lcx.evals.base import Item, Materials
from lcx.evals.text import prose, words
from lcx.evals.text.formats import Sample
from lcx.evals.text.prose import Prose
from lcx.evals.text.questions import Draw, TextQuestions

KINDS, ORDINALS = (
    ("letter", "note", "speech", "story", "report"),
    ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
)
REPLY = 24
"""Words of prose in a reply."""


@dataclasses.dataclass(frozen=True)
class RepeatTurn(TextQuestions):
    """A session of requests for texts, answered by passages of prose, `needles` of which are for the same request.

    One of these is to be repeated behind a random string. A unit is a word of a reply. The score is 0 unless the output
    begins with the string, else the ratio of difflib's SequenceMatcher after it. Chance is 0.
    """

    prose: Prose
    needles: int = 2

    answer_tokens = 64
    units_per_1024 = 140

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's prose."""
        return {"prose": prose.load(materials.given("prose"))}

    def least(self, length: int) -> int:
        """The needles."""
        return self.needles * REPLY

    def answer(self, sample: Sample) -> str:
        """The string and the reply."""
        return f" {sample.references[0]} {sample.references[1]}"

    def compose(self, draw: Draw, units: int) -> Sample:
        """Other requests differ from the one that is asked for in kind or topic."""
        rng, later = draw.rng, random.Random(draw.rng.random())
        kind, topic, code = rng.choice(KINDS), rng.choice(words.listed("noun")), words.letters(rng, 10, string.ascii_lowercase)
        which = rng.randrange(self.needles)
        # The last reply, which is not asked for, has the words that are left over.
        sizes = [REPLY] * (units // REPLY) + [units % REPLY] * (units % REPLY > 0)
        places = set(later.sample(range(units // REPLY), self.needles))
        start, turns, alike = rng.randrange(len(self.prose)), [], []
        for i, size in enumerate(sizes):
            reply = " ".join(self.prose.take(start + 3 * i, size))
            if i in places:
                asked = (kind, topic)
                alike.append(reply)
            else:
                asked = (
                    later.choice(KINDS),
                    later.choice([word for word in later.sample(words.listed("noun"), 2) if word != topic]),
                )
            turns += [f"Write a {asked[0]} about {asked[1]}.", reply]
        prompt = (
            f"Write {code} and, behind it, repeat word for word the {ORDINALS[which]} {kind} about {topic} that you have written."
        )
        return Sample(prompt, "", (code, alike[which]), turns=tuple(turns))

    def score(self, item: Item, output: str) -> float:
        """How alike the rest is, behind the string."""
        said, (code, wanted) = output.strip(), item.references
        if not said.startswith(code):
            return 0.0
        return difflib.SequenceMatcher(None, said.removeprefix(code).strip(), wanted).ratio()
