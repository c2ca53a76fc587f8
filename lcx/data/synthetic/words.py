"""Words, names and numbers of training questions, none of which an evaluation of `lcx.evals` uses."""

from __future__ import annotations

import random
from collections.abc import Callable

ONSETS = ("vr", "zl", "kv", "mj", "dz", "tl", "gz", "pf", "vl", "zd", "mr", "kn")
"""How an invented word begins: no word of the lists that evaluations draw from does."""

MIDDLES, CODAS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v"), ("", "", "l", "m", "n", "r", "s", "x")
VOWELS = "aeiou"

NAMES = (
    "Amira", "Bogdan", "Chidi", "Dolores", "Edvin", "Farah", "Goran", "Hanako", "Ilse", "Joaquin", "Kemal", "Leila", "Mirko",
    "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Stefan", "Tomiko", "Ulrika", "Vikram", "Wanda", "Yusuf",
)  # fmt: skip
"""People."""


FIRSTS = (
    "crimson", "cobalt", "ochre", "maroon", "cedar", "pewter", "granite", "northern", "southern", "eastern", "lower", "outer",
    "inner", "third", "seventh", "ninth", "twelfth", "oaken", "golden", "wicker", "woollen", "scarlet", "indigo", "turquoise",
    "russet", "coastal", "inland", "upland", "riverside", "roadside", "hillside", "Dutch", "Welsh", "Flemish", "Roman", "Greek",
    "Nordic", "alpine", "lavender", "juniper",
)  # fmt: skip
SECONDS = (
    "ledger", "anchor", "chisel", "anvil", "scythe", "sickle", "harness", "bridle", "axle", "loom", "spindle", "thimble", "goblet",
    "tankard", "flagon", "torch", "chimney", "rafter", "gable", "courtyard", "crypt", "lance", "rudder", "keel", "quay", "jetty",
    "lighthouse", "weir", "forge", "smithy", "tannery", "brewery", "granary", "dovecote", "beehive", "furrow", "haystack",
    "windmill", "signpost", "tollgate",
)  # fmt: skip
"""Words of English, none of which is in the lists that evaluations draw from."""


def word(rng: random.Random) -> str:
    """An invented word of two or three syllables."""
    middle = "".join(rng.choice(MIDDLES) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2)))
    return rng.choice(ONSETS) + rng.choice(VOWELS) + middle + rng.choice(CODAS)


def pair(rng: random.Random) -> str:
    """Two words of English, such as northern lighthouse: its tokens are common ones, and other names have one of the words, too."""
    return f"{rng.choice(FIRSTS)} {rng.choice(SECONDS)}"


def number(rng: random.Random) -> str:
    """A whole number of four to eight digits, whose first is not 0."""
    digits = rng.randint(4, 8)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def code(rng: random.Random) -> str:
    """Two letters and digits in groups, such as KX-4071-92."""
    return f"{''.join(rng.choices('BCDFGHJKLMNPQRSTVWXZ', k=2))}-{rng.randrange(1000, 10000)}-{rng.randrange(10, 100)}"


def telling_apart(rng: random.Random, count: int) -> Callable[[random.Random], str]:
    """What `count` facts are told apart by: words or, as long as few of all there are get used up, pairs."""
    return rng.choice((word, pair)) if 4 * count <= len(FIRSTS) * len(SECONDS) else word


VALUES: tuple[Callable[[random.Random], str], ...] = (number, code, word)
"""What a fact may be about."""


class Distinct:
    """Draws that never repeat."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._taken = rng, set()

    def __call__(self, draw: Callable[[random.Random], str]) -> str:
        """The next one that has not been drawn before."""
        while (found := draw(self._rng)) in self._taken:
            pass
        self._taken.add(found)
        return found
