"""Which prompts begin alike: their common beginning is prefilled once, and its cache continued by each of them.

Legend: P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Branches(NamedTuple):
    """Prompts by their `numbers`, longest first, and how many tokens they have in common; 0 where that is not worth a prefill."""

    shared: int
    numbers: list[int]


def branches(prompts: Sequence[np.ndarray], least: int) -> list[Branches]:
    """Every prompt `[P]` once, those with at least `least` tokens in common together; what shares none comes last, in one group.

    In lexicographic order, neighbours have most in common, and a group all that its neighbours have. A prompt joins the group
    before it where that saves more tokens than the group saves without it.
    """
    # Big-endian bytes are in the order of the numbers.
    order = sorted(range(len(prompts)), key=lambda i: np.asarray(prompts[i], ">i4").tobytes())
    groups: list[Branches] = []
    for i in order:
        if groups:
            shared, numbers = groups[-1]
            common = _common(prompts[numbers[-1]], prompts[i])
            # At least one token is left to continue with.
            joined = min(shared, common, len(prompts[i]) - 1)
            if joined >= least and joined * len(numbers) > shared * (len(numbers) - 1):
                groups[-1] = Branches(joined, [*numbers, i])
                continue
        groups.append(Branches(len(prompts[i]) - 1, [i]))
    single = [group.numbers[0] for group in groups if len(group.numbers) == 1]
    several = [group for group in groups if len(group.numbers) > 1]
    found = [*several, *([Branches(0, sorted(single))] if single else [])]
    return [Branches(shared, sorted(numbers, key=lambda i: -len(prompts[i]))) for shared, numbers in found]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two prompts begin with in common."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if len(differ) else size
