"""What training questions practise: each skill writes facts or lines, and asks about them.

Every skill has several wordings, none of them one of an evaluation's.
"""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

from lcx.data.synthetic import words


class Exercise(NamedTuple):
    """One row's exercise.

    `facts` are sentences to hide in prose, in this order; or else the text is made of lines, one more with each call of `line`.
    `ask` gives a question about all that has been written, and its answer, another one with each call; None if there is none
    left. A `{quote}` in a question is where words of the prose go, and the answer is what follows them there; a `{gap}` is where a
    passage of the prose goes with words left out, which are the answer.
    """

    opening: str
    ask: Callable[[], tuple[str, str] | None]
    facts: tuple[str, ...] = ()
    line: Callable[[], str] | None = None


class Size(NamedTuple):
    """How many facts are hidden, how many renamings a chain has, and about how many lines a text of lines has."""

    facts: int
    hops: int
    lines: int


def retrieval(rng: random.Random, size: Size) -> Exercise:
    """One fact of many, or all facts of one thing."""
    fact, one, several = rng.choice(
        (
            (
                "{who} wrote {value} on the {thing} label.",
                "What did {who} write on the {thing} label?",
                "What was written on the {thing} label, by whomever?",
            ),
            (
                "The locker named {thing}, which {who} rents, opens with {value}.",
                "With what does the locker {thing} of {who} open?",
                "With what do the lockers named {thing} open?",
            ),
            (
                "According to {who}, parcel {thing} weighs as much as {value}.",
                "According to {who}, what does parcel {thing} weigh as much as?",
                "What is the weight of parcel {thing} compared with?",
            ),
            (
                "({who}'s note: {thing} = {value})",
                "What does the note of {who} say {thing} equals?",
                "What do the notes say {thing} equals?",
            ),
            (
                "In the register of {who}, beneath the heading {thing} and in another hand, stands {value}.",
                "What stands in the register of {who} beneath the heading {thing}?",
                "What stands in any register beneath the heading {thing}?",
            ),
            (
                "{value} is what {who} was told to bring along to the {thing}.",
                "What was {who} told to bring along to the {thing}?",
                "What was anybody told to bring along to the {thing}?",
            ),
            (
                "The ticket that {who} got for the {thing} at the last moment bears the mark {value}.",
                "Which mark does the ticket of {who} for the {thing} bear?",
                "Which marks do tickets for the {thing} bear?",
            ),
            (
                "Nobody but {who} had heard that the {thing} was known abroad as {value}.",
                "As what was the {thing} known abroad, of which {who} had heard?",
                "As what was the {thing} known abroad?",
            ),
        )
    )
    draw, kind, named = words.Distinct(rng), rng.choice(words.VALUES), words.telling_apart(rng, size.facts)
    shared = rng.random() < 0.3
    things = [draw(named) for _ in range(max(1, size.facts // 2) if shared else size.facts)]
    # Where all facts are one person's, only the things tell them apart.
    people = [rng.choice(words.NAMES)] if rng.random() < 0.5 else words.NAMES
    facts = [(rng.choice(people), things[i % len(things)], draw(kind)) for i in range(size.facts)]
    rng.shuffle(facts)
    order = list(things)
    rng.shuffle(order)

    def ask() -> tuple[str, str] | None:
        if not order:
            return None
        thing = order.pop()
        found = [(who, value) for who, what, value in facts if what == thing]
        if len(found) == 1:
            return one.format(who=found[0][0], thing=thing), found[0][1]
        return f"{several.format(thing=thing)} List all, in the order of the text.", ", ".join(value for _, value in found)

    told = tuple(fact.format(who=who, thing=thing, value=value) for who, thing, value in facts)
    return Exercise("Somewhere in these pages are a few facts that do not belong to them. Find them when asked.\n", ask, told)


def lookup(rng: random.Random, size: Size) -> Exercise:
    """Pairs, one a line."""
    line, question = rng.choice(
        (
            ("{key} -> {value}", "Where does {key} point?"),
            ("| {key} | {value} |", "Which entry is in the row of {key}?"),
            ("{key}: {value}", "What is listed for {key}?"),
            ("<item name={key}>{value}</item>", "What is inside the item named {key}?"),
        )
    )
    draw, kind, named, pairs = words.Distinct(rng), rng.choice(words.VALUES), words.telling_apart(rng, 2 * size.lines), []

    def more() -> str:
        pairs.append((draw(named), draw(kind)))
        return line.format(key=pairs[-1][0], value=pairs[-1][1])

    return Exercise("A list to consult:\n", _each(rng, pairs, lambda pair: (question.format(key=pair[0]), pair[1])), line=more)


def tracking(rng: random.Random, size: Size) -> Exercise:
    """Values that are handed on from name to name."""
    first, then, question, reverse = rng.choice(
        (
            (
                "Let {name} stand for {value}.",
                "From here on {name} stands for whatever {old} does.",
                "What does {name} stand for?",
                "Which names stand for {value}?",
            ),
            (
                "The box {name} is filled with {value}.",
                "The box {name} gets the same contents as the box {old}.",
                "What is in the box {name}?",
                "Which boxes hold {value}?",
            ),
            (
                "register {name} <- {value};",
                "register {name} <- register {old};",
                "What does register {name} hold?",
                "Which registers hold {value}?",
            ),
        )
    )
    draw, chains, facts = words.Distinct(rng), [], []
    for _ in range(max(1, size.facts // 2)):
        value, names = draw(rng.choice(words.VALUES)), [draw(words.word) for _ in range(size.hops + 1)]
        chains.append((value, names))
    # Chains run side by side; within one the order is that of the text.
    left = [list(range(len(names))) for _, names in chains]
    while any(left):
        at = rng.choice([i for i, rest in enumerate(left) if rest])
        step, (value, names) = left[at].pop(0), chains[at]
        facts.append(first.format(name=names[0], value=value) if step == 0 else then.format(name=names[step], old=names[step - 1]))

    def about(chain: tuple[str, list[str]]) -> tuple[str, str]:
        value, names = chain
        if rng.random() < 0.5:
            return question.format(name=names[-1]), value
        return reverse.format(value=value) + " In the order of the text.", ", ".join(names)

    return Exercise("Names are given values in the pages below, and pass them on.\n", _each(rng, chains, about), tuple(facts))


COUNTED = 48
"""Lines that are counted, about, whatever the length."""


def counting(rng: random.Random, size: Size) -> Exercise:
    """How often something happened, and who did it most."""
    verb, noun = rng.choice((("borrowed", "book"), ("sold", "crate"), ("repaired", "engine"), ("planted", "tree")))
    people, kinds = rng.sample(words.NAMES, 4), [words.word(rng) for _ in range(4)]
    shares, seen = [rng.uniform(0.1, 1) for _ in people], collections.Counter()
    # Whatever the length, about `COUNTED` lines are counted; the others are of other kinds.
    others, rate = [words.word(rng) for _ in range(24)], min(1.0, COUNTED / max(1, size.lines))
    asked: list[tuple[str | None, str | None]] = [(who, None) for who in people] + [(None, kind) for kind in kinds]
    asked += [(who, kind) for who in people for kind in kinds]
    rng.shuffle(asked)

    def more() -> str:
        who, kind = rng.choices(people, shares)[0], rng.choice(kinds if rng.random() < rate else others)
        seen[who, kind] += 1
        return f"{who} {verb} a {kind} {noun}."

    def ask() -> tuple[str, str] | None:
        if not asked:
            return None
        who, kind = asked.pop()
        wanted = (kind,) if kind else kinds
        total = sum(times for (one, other), times in seen.items() if who in (None, one) and other in wanted)
        what = f"a {kind} {noun}" if kind else f"a {noun} of the kinds {', '.join(kinds)}"
        return f"How many times was {what} {verb}{f' by {who}' if who else ''}?", str(total)

    return Exercise("A diary, one event a line:\n", ask, line=more)


ACTIVE = 5
"""Things that are moved by turns."""


def state(rng: random.Random, size: Size) -> Exercise:
    """Where things are, after all that happened to them."""
    # A thing is moved for a while and then left alone, so that its last move stands anywhere.
    draw, moves = words.Distinct(rng), itertools.count()
    things, places = [draw(words.word) for _ in range(ACTIVE + size.lines // 6)], [draw(words.word) for _ in range(6)]
    moved, shown, back = rng.choice(
        (
            (
                "{who} carried the {thing} to the {place}.",
                "Where is the {thing} at the end?",
                "Where was the {thing} before it came to its last place?",
            ),
            (
                "{thing}: shipped to {place} by {who}",
                "Which place was {thing} shipped to last?",
                "Which place did {thing} leave last?",
            ),
            (
                "[{who}] mv {thing} {place}/",
                "In which folder is {thing} now?",
                "In which folder was {thing} before the last move?",
            ),
        )
    )
    history: dict[str, list[str]] = {thing: [] for thing in things}
    order = [(thing, latest) for thing in things for latest in (True, False)]
    rng.shuffle(order)

    def more() -> str:
        first = min(next(moves) // 6, len(things) - ACTIVE)
        thing = things[first + rng.randrange(ACTIVE)]
        place = rng.choice([place for place in places if history[thing][-1:] != [place]])
        history[thing].append(place)
        return moved.format(who=rng.choice(words.NAMES), thing=thing, place=place)

    def ask() -> tuple[str, str] | None:
        while order:
            thing, latest = order.pop()
            if len(history[thing]) >= 2 - latest:
                return (shown if latest else back).format(thing=thing), history[thing][-1 if latest else -2]
        return None

    return Exercise("Follow what happens to each thing:\n", ask, line=more)


def learning(rng: random.Random, size: Size) -> Exercise:
    """Classes that the examples alone define: one word of an example tells its class."""
    classes, line, head = (
        rng.randint(3, 6),
        rng.choice(("{text} => {label}", "{text} [{label}]", "in: {text} out: {label}")),
        rng.choice(("Sort new items as the sorted ones are.", "The mark of each example follows a rule; apply it.")),
    )
    draw = words.Distinct(rng)
    labels, marks = (
        [draw(words.word) for _ in range(classes)],
        [[draw(words.word) for _ in range(2 + size.lines // 6)] for _ in range(classes)],
    )
    fillers, shown = [draw(words.word) for _ in range(10)], []

    def text(k: int, mark: str) -> str:
        parts = [mark, *rng.sample(fillers, 3)]
        rng.shuffle(parts)
        return " ".join(parts)

    def more() -> str:
        k = rng.randrange(classes)
        mark = rng.choice(marks[k])
        shown.append((k, mark))
        return line.format(text=text(k, mark), label=labels[k])

    def ask() -> tuple[str, str] | None:
        if not shown:
            return None
        # A word that was last seen anywhere, not mostly near the end.
        last, place = {example: i for i, example in enumerate(shown)}, rng.randrange(len(shown))
        k, mark = min(last, key=lambda example: abs(last[example] - place))
        return f"Which mark does this get: {text(k, mark)}", labels[k]

    return Exercise(f"{head}\n", ask, line=more)


def copying(rng: random.Random, size: Size) -> Exercise:
    """The words behind some that are quoted from the text."""
    question = rng.choice(
        ("Go on as the text does: {quote}", "How does the passage continue that reads: {quote}", "Finish this quotation: {quote}")
    )
    return Exercise("Read these pages; you will be asked to quote from them.\n", lambda: (question, ""))


def cloze(rng: random.Random, size: Size) -> Exercise:
    """The words that are left out of a passage of the text."""
    question = rng.choice(
        (
            "Which words fill the blank: {gap}",
            "Some words of this passage were rubbed out; restore them: {gap}",
            "Complete it: {gap}",
        )
    )
    return Exercise("Passages of these pages will come back with holes in them.\n", lambda: (question, ""))


def _each(rng: random.Random, things: list, about: Callable) -> Callable[[], tuple[str, str] | None]:
    """Questions about a list's members, none twice, in random order."""
    done: set[int] = set()

    def ask() -> tuple[str, str] | None:
        rest = [i for i in range(len(things)) if i not in done]
        if not rest:
            return None
        at = rng.choice(rest)
        done.add(at)
        return about(things[at])

    return ask


SKILLS: dict[str, Callable[[random.Random, Size], Exercise]] = {
    "retrieval": retrieval,
    "lookup": lookup,
    "tracking": tracking,
    "counting": counting,
    "state": state,
    "learning": learning,
    "copying": copying,
    "cloze": cloze,
}
"""By name."""
