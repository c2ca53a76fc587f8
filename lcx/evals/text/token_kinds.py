"""What kind of text a token is a part of, and whether it repeats what stands before it.

A mean loss hides that a longer context helps names and numbers that occurred before, and hardly anything else.

Legend: n tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

KINDS = ("word", "name", "number", "code", "symbol", "space")
"""Every token has one of these: that of the first character of its text that is not a space."""

COPIES = ("new", "copied_near", "copied_far")
"""And one of these."""

COPY_BYTES = 16
"""A token is copied if it ends so many bytes of text that stand before it, too."""

_WORDS = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")
_UNIT = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]+|\s+")
_CAMEL = re.compile(r"[^\W\d_]*[a-z][A-Z]\w*$")
_SENTENCE_END = re.compile(r"(?:^|[.!?:][\"'”’)\]]*\s+|\n\s*[\"'“‘(\[]*)$")


def kinds(pieces: Sequence[str]) -> np.ndarray:
    """Numbers int8 `[n]` into `KINDS`, from the text that each token adds.

    A number is a unit of letters and digits that begins with a digit; code has an underscore, a digit among letters or a capital
    behind a small letter, or is a symbol other than those of prose; a name begins with a capital inside a sentence.
    """
    text = "".join(pieces)
    of_character = np.empty(len(text), np.int8)
    for unit in _UNIT.finditer(text):
        of_character[unit.start() : unit.end()] = KINDS.index(_kind(unit[0], text, unit.start()))
    found = np.empty(len(pieces), np.int8)
    at, last = 0, KINDS.index("space")
    for i, piece in enumerate(pieces):
        first = at + len(piece) - len(piece.lstrip())
        if piece:
            # The first bytes of a character add no text: they are of the kind of what comes last.
            last = int(of_character[min(first, at + len(piece) - 1)])
        found[i], at = last, at + len(piece)
    return found


def _kind(unit: str, text: str, start: int) -> str:
    if unit.isspace():
        return "space"
    if not (unit[0].isalnum() or unit[0] == "_"):
        return "symbol" if all(c in ".,;:!?'\"-–—()“”‘’…" for c in unit) else "code"
    if unit[0].isdigit():
        return "number"
    if not _WORDS.fullmatch(unit) or _CAMEL.match(unit):
        return "code"
    if unit[0].isupper() and unit != "I" and not _SENTENCE_END.search(text, max(0, start - 8), start):
        return "name"
    return "word"


def copies(tokens: np.ndarray, bytes_per_token: float, near: int) -> np.ndarray:
    """Numbers int8 `[n]` into `COPIES`: whether a token and those before it, `COPY_BYTES` of text, occurred before, and if their
    last occurrence is more than `near` tokens back."""
    size = max(2, round(COPY_BYTES / bytes_per_token))
    found, seen = np.zeros(len(tokens), np.int8), {}
    ids = [int(token) for token in tokens]
    for end in range(size, len(ids) + 1):
        gram = tuple(ids[end - size : end])
        if gram in seen:
            found[end - 1] = 1 if end - seen[gram] <= near else 2
        seen[gram] = end
    return found
