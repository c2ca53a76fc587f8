"""Passages of a document, and those of them that stand far apart.

Legend: P passages.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Sequence

_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?…][\"'”’)\]]*\s|[。！？]"), re.compile(r"\s"))
"""Where a text may be cut: between paragraphs rather than lines, sentences, words."""


def cut(text: str, most: int) -> list[tuple[int, int]]:
    """(start, end) of passages that make up the text, each of at most `most` characters and none much shorter than the others."""
    found, at = [], 0
    while at < len(text):
        left = len(text) - at
        if left <= most:
            end = len(text)
        else:
            # Passages of equal length would have so many characters; none has less than half of that.
            room = -(-left // -(-left // most))
            end = at + _end(text[at : at + room])
        found.append((at, end))
        at = end
    return found


def _end(window: str) -> int:
    """The last place in the second half of a text at which it may be cut, of the best kind that there is."""
    for kind in _ENDS:
        places = [match.end() for match in kind.finditer(window, len(window) // 2)]
        if places:
            return places[-1]
    return len(window)


def far_apart(rng: random.Random, starts: Sequence[float], ends: Sequence[float], count: int, distance: float) -> list[int] | None:
    """`count` of the passages `[P]`, in order, with at least `distance` between two; each choice is as likely as any other.

    None if there is no such choice. `starts` and `ends` are in the unit of the distance.
    """
    size = len(starts)
    behind = [bisect.bisect_left(starts, end + distance) for end in ends]
    # ways[k][i]: in how many ways k passages can be chosen of those from number i on.
    ways = [[1] * (size + 1)]
    for _ in range(count):
        row = [0] * (size + 1)
        for i in reversed(range(size)):
            row[i] = row[i + 1] + ways[-1][behind[i]]
        ways.append(row)
    chosen: list[int] = []
    first = 0
    for left in range(count, 0, -1):
        row = ways[left]
        if not row[first]:
            return None
        drawn = rng.randrange(row[first])
        # The rows fall: the last number from which on there are more ways than were drawn.
        place = bisect.bisect_left(row, -drawn, first, size, key=lambda value: -value) - 1
        chosen.append(place)
        first = behind[place]
    return chosen
