"""BABILong (Kuratov et al., 2406.10149): facts of bAbI's first five tasks, scattered in their order over prose.

Stories come from simulators of our own; answers are scored as the benchmark scores them.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lcx.evals.base import Item, Materials
from lcx.evals.text import prose
from lcx.evals.text.formats import Sample
from lcx.evals.text.prose import Prose
from lcx.evals.text.questions import Draw, TextQuestions

PEOPLE, ROOMS = ("John", "Mary", "Sandra", "Daniel"), ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
GIVERS, THINGS = ("Bill", "Fred", "Jeff", "Mary"), ("apple", "football", "milk")
GO, GET, DROP = (
    ("went to", "moved to", "journeyed to", "travelled to"),
    ("got", "took", "picked up"),
    ("dropped", "put down", "left"),
)
GIVE, DIRECTIONS = ("gave", "handed", "passed"), ("north", "south", "east", "west")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Story(NamedTuple):
    """Facts in their order, a question about them, and its answer."""

    facts: list[str]
    question: str
    answer: str


def place_of_person(rng: random.Random) -> Story:
    """qa1: the last place where a person went."""
    moves = [(rng.choice(PEOPLE), rng.choice(ROOMS)) for _ in range(rng.randint(2, 10))]
    who = rng.choice(moves)[0]
    facts = [f"{person} {rng.choice(GO)} the {room}." for person, room in moves]
    return Story(facts, f"Where is {who}?", next(room for person, room in reversed(moves) if person == who))


def _carrying(rng: random.Random, events: int) -> tuple[list[str], dict[str, list[str]]]:
    """Facts of people who go about and carry things, and the rooms that each thing has been in, one after the other."""
    at = {person: rng.choice(ROOMS) for person in PEOPLE}
    facts = [f"{person} {rng.choice(GO)} the {room}." for person, room in at.items()]
    held: dict[str, str] = {}
    been: dict[str, list[str]] = {}
    for _ in range(events):
        person = rng.choice(PEOPLE)
        own = [thing for thing, holder in held.items() if holder == person]
        free = [thing for thing in THINGS if thing not in held and (thing not in been or been[thing][-1] == at[person])]
        kind = rng.random()
        if kind < 0.35 and free:
            thing = rng.choice(free)
            held[thing] = person
            been.setdefault(thing, [at[person]])
            facts.append(f"{person} {rng.choice(GET)} the {thing} there.")
        elif kind < 0.5 and own:
            thing = rng.choice(own)
            del held[thing]
            facts.append(f"{person} {rng.choice(DROP)} the {thing}.")
        else:
            at[person] = rng.choice([room for room in ROOMS if room != at[person]])
            facts.append(f"{person} {rng.choice(GO)} the {at[person]}.")
            for thing in own:
                been[thing].append(at[person])
    return facts, been


def place_of_thing(rng: random.Random) -> Story:
    """qa2: where a thing is, which somebody has carried."""
    while True:
        facts, been = _carrying(rng, rng.randint(6, 20))
        if been:
            thing = rng.choice(sorted(been))
            return Story(facts, f"Where is the {thing}?", been[thing][-1])


def place_before(rng: random.Random) -> Story:
    """qa3: where a thing was before it came to a place."""
    while True:
        facts, been = _carrying(rng, rng.randint(10, 30))
        known = [
            (thing, rooms[i - 1], room)
            for thing, rooms in sorted(been.items())
            for i, room in enumerate(rooms)
            if i and rooms.count(room) == 1
        ]
        if known:
            thing, before, room = rng.choice(known)
            return Story(facts, f"Where was the {thing} before the {room}?", before)


def neighbours(rng: random.Random) -> Story:
    """qa4: two facts about three rooms, and a question about one of them from either side."""
    one, middle, other = rng.sample(ROOMS, 3)
    first, second = rng.sample(DIRECTIONS, 2)
    while second == OPPOSITE[first]:
        first, second = rng.sample(DIRECTIONS, 2)
    facts = [f"The {one} is {first} of the {middle}.", f"The {middle} is {second} of the {other}."]
    rng.shuffle(facts)
    questions = [
        (f"What is {first} of the {middle}?", one),
        (f"What is the {one} {first} of?", middle),
        (f"What is {second} of the {other}?", middle),
        (f"What is the {middle} {second} of?", other),
    ]
    return Story(facts, *rng.choice(questions))


def gifts(rng: random.Random) -> Story:
    """qa5: who gave what to whom; what is asked for happened once."""
    while True:
        events = [(*rng.sample(GIVERS, 2), rng.choice(THINGS)) for _ in range(rng.randint(2, 8))]
        giver, taker, thing = rng.choice(events)
        questions = [
            (f"Who gave the {thing} to {taker}?", giver, [e for e in events if e[1:] == (taker, thing)]),
            (f"What did {giver} give to {taker}?", thing, [e for e in events if e[:2] == (giver, taker)]),
            (f"Who did {giver} give the {thing} to?", taker, [e for e in events if (e[0], e[2]) == (giver, thing)]),
        ]
        question, answer, same = rng.choice(questions)
        if len(same) == 1:
            return Story([f"{a} {rng.choice(GIVE)} the {c} to {b}." for a, b, c in events], question, answer)


class Kind(NamedTuple):
    """A task: its simulator, its labels, and two sentences on what is told and how to answer."""

    story: Callable[[random.Random], Story]
    labels: tuple[str, ...]
    told: str


KINDS = {
    "qa1": Kind(place_of_person, ROOMS, "where people have gone. A person is where the person went last"),
    "qa2": Kind(place_of_thing, ROOMS, "where people have gone and what they carry with them"),
    "qa3": Kind(place_before, ROOMS, "where people have gone and what they carry with them, one thing after the other"),
    "qa4": Kind(neighbours, ROOMS, "how places lie to one another"),
    "qa5": Kind(gifts, (*GIVERS, *THINGS), "what people have given to one another"),
}


@dataclasses.dataclass(frozen=True)
class Babilong(TextQuestions):
    """A story's facts at sorted random places in prose that names none of its people, rooms and things; a unit is a word of prose.

    Two solved examples come first. Chance is that of naming one of the labels.
    """

    prose: Prose
    kind: str = "qa1"

    answer_tokens = 20
    units_per_1024 = 128

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any]:
        """The user's prose, without sentences that could be taken for facts."""
        named = (*PEOPLE, *ROOMS, *GIVERS, *THINGS)
        return {"prose": prose.load(materials.given("prose")).without(named)}

    @property
    def chance(self) -> float:
        """One in the number of labels, of a guess that may also name those of the question, which do not count."""
        return 1 / len(KINDS[self.kind].labels)

    def compose(self, draw: Draw, units: int) -> Sample:
        """The story first, so that it is the same whatever the size."""
        kind, rng = KINDS[self.kind], draw.rng
        story, examples = kind.story(rng), [kind.story(rng) for _ in range(2)]
        hay = self.prose.take(rng.randrange(len(self.prose)), units)
        places = sorted(rng.randint(0, len(hay)) for _ in story.facts)
        for place, fact in zip(reversed(places), reversed(story.facts), strict=True):
            hay.insert(place, fact)
        solved = "".join(f"<example>\n{' '.join(x.facts)} {x.question}\nAnswer: {x.answer}\n</example>\n" for x in examples)
        prompt = (
            f"The context below hides facts about {kind.told}, among sentences that do not matter. Use these facts alone to answer "
            f"the question.\n{solved}Always answer with a single word.\n"
            f"<context>\n{' '.join(hay)}\n</context>\nQuestion: {story.question}"
        )
        return Sample(prompt, "\nAnswer:", (story.answer,))

    def score(self, item: Item, output: str) -> float:
        """1 if the answer is the only label in the first sentence, those of the question not counted."""
        question = item.text.rpartition("Question: ")[2].lower()
        said = re.split(r"\.|<context>|<example>", output.lower())[0]
        found = {label.lower() for label in KINDS[self.kind].labels if label.lower() in said and label.lower() not in question}
        return float(found == {item.references[0].lower()})
