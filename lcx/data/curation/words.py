"""Words of a text as arrays: where they are, how long, and a 64-bit hash of each, with a few NumPy operations per character.

A word is a run of letters, digits and combining marks, in lower case; whatever else there is separates words. In scripts written
without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word. No list of words of any language is used.

Legend: C characters, W words, K n-grams.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata

import numpy as np

SPACE, WORD, LETTER, UNSPACED = 1, 2, 4, 8
"""Bits of a character's class."""

_TABLE_SIZE = 0x30000
"""Characters from here on (private use, tags, a few rare ideographs) count as symbols."""
_UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    *((0xF900, 0xFAFF), (0x20000, 0x2FFFD)),
)
_BLOCK = 1 << 15
"""Characters hashed at once, few enough for the processor's cache."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BASE = 0xD6E8FEB86659FD93
_POWERS = np.cumprod(np.full(2 * _BLOCK, _BASE, np.uint64))
_INVERSES = np.cumprod(np.full(_BLOCK, pow(_BASE, -1, 1 << 64), np.uint64))


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Lower case uint32 and class uint8 of each character; white space becomes a space."""
    lower = np.arange(_TABLE_SIZE, dtype=np.uint32)
    kind = np.zeros(_TABLE_SIZE, np.uint8)
    for code in range(_TABLE_SIZE):
        char = chr(code)
        category = unicodedata.category(char)
        if char.isspace():
            lower[code], kind[code] = 32, SPACE
        elif category[0] in "LNM":
            kind[code] = WORD | LETTER if category[0] == "L" else WORD
            if len(small := char.lower()) == 1:
                lower[code] = ord(small)
    for first, last in _UNSPACED:
        span = slice(first, last + 1)
        kind[span] = np.where(kind[span] & WORD, kind[span] | UNSPACED, kind[span])
    return lower, kind


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a text: `hashes` uint64 `[W]`, `lengths` int64 `[W]` in characters.

    `runs` counts runs without white space, `named_runs` those with a letter or digit, `lettered_runs` those with a letter.
    `collapsed` is the text in lower case with single spaces, as bytes of UTF-32.
    """

    hashes: np.ndarray
    lengths: np.ndarray
    runs: int
    named_runs: int
    lettered_runs: int
    collapsed: bytes


def split(text: str) -> Words:
    """The words of a text."""
    lower, kind = _tables()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    normal, kinds = lower.take(codes, mode="clip"), kind.take(codes, mode="clip")
    space, word = (kinds & SPACE).view(bool), (kinds & WORD) != 0
    apart = (kinds & UNSPACED) != 0
    any_apart = bool(apart.any())
    starts = np.flatnonzero(_beginnings(word, apart if any_apart else None))
    ends = np.flatnonzero(_beginnings(word[::-1], apart[::-1] if any_apart else None)[::-1])
    lengths = ends - starts + 1
    run_starts = _beginnings(~space, apart if any_apart else None)
    run_of = np.cumsum(run_starts, dtype=np.int32)
    letters = np.flatnonzero(_beginnings((kinds & LETTER) != 0, None))
    doubled = np.zeros(len(space), bool)
    doubled[1:] = space[1:] & space[:-1]
    return Words(
        hashes=_hashes(normal, starts, lengths),
        lengths=lengths,
        runs=int(run_of[-1]) if len(run_of) else 0,
        named_runs=_distinct(run_of[starts]),
        lettered_runs=_distinct(run_of[letters]),
        collapsed=_collapse(normal, doubled),
    )


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes uint64 `[K]` of the sequences of n words, in order; fewer than n words have none."""
    if len(hashes) < n:
        return hashes[:0]
    found = hashes
    for size in range(2, n + 1):
        found = longer(found, hashes, size)
    return found


def longer(shorter: np.ndarray, hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes uint64 `[K]` of the sequences of n words, from those of n − 1 words and of the words themselves."""
    return shorter[:-1] * _MULTIPLIER + hashes[n - 1 :]


def mix(keys: np.ndarray) -> np.ndarray:
    """uint64 keys whose every bit depends on all bits of the given ones (the finalizer of SplitMix64)."""
    keys = keys ^ (keys >> np.uint64(30))
    keys = keys * np.uint64(0xBF58476D1CE4E5B9)
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _beginnings(member: np.ndarray, apart: np.ndarray | None) -> np.ndarray:
    """bool `[C]`: whether a run of members begins here; each of those that stand apart is a run by itself."""
    begins = member.copy()
    if apart is None:
        begins[1:] &= ~member[:-1]
    else:
        begins[1:] &= ~member[:-1] | apart[1:] | apart[:-1]
    return begins


def _distinct(ordered: np.ndarray) -> int:
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + 1 if len(ordered) else 0


def _collapse(normal: np.ndarray, doubled: np.ndarray) -> bytes:
    kept = normal[~doubled]
    first = int(len(kept) > 0 and kept[0] == 32)
    last = len(kept) - int(len(kept) > first and kept[-1] == 32)
    return kept[first:last].tobytes()


def _hashes(codes: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 `[W]`: a polynomial in each word's characters, mixed. Of a word longer than `_BLOCK` the rest counts by its length.

    Differences of one running sum of code × power give all words of a block, each times the power of its own place.
    """
    hashes = np.empty(len(starts), np.uint64)
    at = 0
    while at < len(starts):
        first = starts[at]
        stop = int(np.searchsorted(starts, first + _BLOCK))
        begin = starts[at:stop] - first
        span = codes[first : first + 2 * _BLOCK].astype(np.uint64)
        span *= _POWERS[: len(span)]
        total = np.cumsum(span)
        end = begin + np.minimum(lengths[at:stop], _BLOCK) - 1
        hashes[at:stop] = (total[end] - total[begin] + span[begin]) * _INVERSES[begin]
        at = stop
    return mix(hashes + lengths.astype(np.uint64))
