"""Gaps in a passage of a text, which only those can fill who remember the text: cloze questions from its own rare n-grams.

Legend: P tokens of the text, V vocabulary.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TRIES = 16
"""How many n-grams are looked at."""


class Gap(NamedTuple):
    """The tokens in front of the gap, in it, and behind it."""

    left: np.ndarray
    answer: np.ndarray
    right: np.ndarray


def find(
    rng: random.Random,
    prose_P: np.ndarray,
    begins_word_V: np.ndarray,
    blank_V: np.ndarray,
    decode: Callable[[np.ndarray], str],
    *,
    words: int,
    room: int,
    most: int,
    before: int,
) -> Gap | None:
    """An n-gram of `words` words that the text holds once, in its passage of `room` tokens, gap included; None if none is found.

    `begins_word_V` says which tokens begin with white space, `blank_V` which are nothing else. The n-gram lies on one line, has at
    most `most` tokens and ends at or in front of the token `before`; one of its words occurs nowhere else in the text. So that only
    one place is meant, what stands on one side of the gap occurs once too. Among all such n-grams one is drawn, so that gaps lie
    evenly over the text.
    """
    if len(prose_P) < room:
        return None
    # Several spaces and line breaks in a row belong to the word behind them.
    starts = np.flatnonzero(begins_word_V[prose_P] & ~np.concatenate([[False], blank_V[prose_P[:-1]]]))
    found = _rare(prose_P, starts, words, most, before)
    if not found:
        # The tokens do not tell where words begin.
        found = _rare(prose_P, np.arange(len(prose_P)), max(1, most // 2), most, before)
    text = decode(prose_P)
    for _ in range(min(TRIES, len(found))):
        first, last = found.pop(rng.randrange(len(found)))
        answer = decode(prose_P[first:last])
        said = answer.strip()
        if "\n" in answer or text.count(said) != 1 or not any(map(_wordy, said.split())):
            continue
        # The passage gets what the answer leaves, shared by both sides.
        spare = room - (last - first)
        left = min(first, max(spare // 2, spare - (len(prose_P) - last)))
        gap = Gap(prose_P[first - left : first], prose_P[first:last], prose_P[last : last + spare - left])
        if _times(prose_P, gap.left) == 1 or _times(prose_P, gap.right) == 1:
            return gap
    return None


def _rare(prose_P: np.ndarray, starts: np.ndarray, words: int, most: int, before: int) -> list[tuple[int, int]]:
    """Begin and end of the n-grams of words, which begin at `starts`, that hold a word which occurs once."""
    if len(starts) <= words:
        return []
    pieces = [prose_P[a:b].tobytes() for a, b in zip(starts[:-1], starts[1:], strict=True)]
    counts = collections.Counter(pieces)
    once = np.array([counts[piece] == 1 for piece in pieces], int)
    begin, end = starts[:-words], starts[words:]
    fits = (np.convolve(once, np.ones(words, int), "valid") > 0) & (end - begin <= most) & (end <= before)
    return list(zip(begin[fits].tolist(), end[fits].tolist(), strict=True))


def _wordy(word: str) -> bool:
    return sum(map(str.isalnum, word)) >= 3


def _times(text: np.ndarray, passage: np.ndarray) -> int:
    """How often a passage occurs."""
    if not len(passage) or len(passage) > len(text):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(text, len(passage))
    # Few places agree in the first token; the others need not be compared.
    places = np.flatnonzero(text[: len(windows)] == passage[0])
    return int((windows[places] == passage).all(axis=1).sum())
