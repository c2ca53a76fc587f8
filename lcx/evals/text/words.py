"""Words, numbers and identifiers that no prompt holds by chance.

The lists are those of the wonderwords library, which RULER draws from as well.
"""

from __future__ import annotations

import functools
import random
import string
import uuid
from collections.abc import Sequence

import wonderwords


@functools.cache
def listed(*kinds: str) -> tuple[str, ...]:
    """The words of some kinds ("noun", "adjective", "verb"), each once, in alphabetical order, one lowercase word an entry."""
    reader = wonderwords.RandomWord
    found = {word for kind in kinds for word in reader.read_words(f"{kind}list.txt")}
    return tuple(sorted(word for word in found if word.isascii() and word.isalpha() and word.islower()))


def key(rng: random.Random) -> str:
    """An adjective and a noun, joined by a hyphen."""
    return f"{rng.choice(listed('adjective'))}-{rng.choice(listed('noun'))}"


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of exactly `digits` digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def identifier(rng: random.Random) -> str:
    """A random UUID, version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_uppercase) -> str:
    """`count` random letters."""
    return "".join(rng.choices(alphabet, k=count))


class Distinct:
    """Draws that never repeat, whatever draws them."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self._taken = set(taken)

    def __call__(self, draw, *args) -> str:
        """The next `draw(*args)` that has not been drawn before."""
        while (found := draw(*args)) in self._taken:
            pass
        self._taken.add(found)
        return found


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All nouns, adjectives and verbs."""
    return listed("noun", "adjective", "verb")


def unique_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words in random order: those of the list first, then compounds of an adjective and a noun."""
    words = rng.sample(vocabulary(), min(count, len(vocabulary())))
    draw = Distinct(words)
    while len(words) < count:
        words.append(draw(lambda: rng.choice(listed("adjective")) + rng.choice(listed("noun"))))
    return words


def not_contained(words: Sequence[str], count: int, among: Sequence[str]) -> list[str]:
    """The first `count` of the words that are part of no other word of `among`, in which they stand themselves."""
    joined, found = "\n".join(among), []
    for word in words:
        if joined.count(word) == 1:
            found.append(word)
            if len(found) == count:
                break
    return found
