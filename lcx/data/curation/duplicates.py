"""Near-duplicates by MinHash (Broder 1997; buckets as in FineWeb, arXiv:2406.17557), and which of several duplicates stays.

Legend: D documents, W words, K n-grams, B buckets.
"""

from __future__ import annotations

import array
import functools
from collections.abc import Iterable

import numpy as np

from lcx.data.curation import words
from lcx.data.curation.document import Document
from lcx.data.curation.settings import MinHashSettings

_BLOCK = 1 << 13
"""N-grams taken at once."""
_VALUES = 1 << 15
"""Values of n-grams under permutations computed at once: few enough for the processor's cache, enough to be worth a call."""

_ROWS = 1 << 14
"""Documents whose groups are turned into Python's numbers at once."""


def bucket_keys(settings: MinHashSettings, document: Document) -> np.ndarray | None:
    """Keys uint64 `[B]` of a document, None if it has no words; two documents with one key in common are near-duplicates."""
    smallest: np.ndarray | None = None
    for hashes in document.word_hashes(settings.ngram - 1):
        if len(hashes):
            shingles = words.ngrams(hashes, min(settings.ngram, len(hashes)))
            found = signature(shingles, settings.buckets * settings.hashes)
            smallest = found if smallest is None else np.minimum(smallest, found)
    return None if smallest is None else keys_of(smallest, settings)


def signature(shingles: np.ndarray, count: int) -> np.ndarray:
    """The smallest of the n-grams' values uint64 `[K]` under `count` permutations of 32 bits, uint32 `[count]`.

    Two sets agree in each place with a probability equal to their Jaccard index.
    """
    short = (words.mix(shingles) >> np.uint64(32)).astype(np.uint32)
    factors, summands = _permutations(count)
    smallest = np.full(count, 0xFFFFFFFF, np.uint32)
    step = max(1, _VALUES // max(1, min(_BLOCK, len(short))))
    buffer = np.empty((min(step, count), min(_BLOCK, len(short))), np.uint32)
    for at in range(0, len(short), _BLOCK):
        block = short[at : at + _BLOCK]
        for i in range(0, count, step):
            some = slice(i, i + step)
            value = buffer[: min(step, count - i), : len(block)]
            np.multiply(block, factors[some, None], out=value)
            value ^= summands[some, None]
            smallest[some] = np.minimum(smallest[some], value.min(1))
    return smallest


def keys_of(smallest: np.ndarray, settings: MinHashSettings) -> np.ndarray:
    """A signature's keys uint64 `[B]`, each a hash of the values of one bucket."""
    rows = smallest.reshape(settings.buckets, settings.hashes).astype(np.uint64)
    return words.mix((rows * _factors(settings.hashes)).sum(1, dtype=np.uint64))


def first_come(columns: Iterable[np.ndarray], candidates: np.ndarray) -> np.ndarray:
    """The document int64 `[D]` that each duplicates, with which it shares a key and which stays; -1 for one that stays itself.

    `columns` are keys uint64 `[D]`, a column per bucket; `candidates` bool `[D]` says which documents take part. Documents are in
    the order in which the first stays. One that shares a key with nothing but dropped documents stays too. Needs 4 bytes for each
    key of a document.
    """
    ids = np.flatnonzero(candidates)
    columns_of_groups, count = [], 0
    for column in columns:
        groups_D, fresh = _groups(column[ids])
        groups_D[groups_D >= 0] += count
        columns_of_groups.append(groups_D)
        count += fresh
    found = np.full(len(candidates), -1, np.int64)
    first = _greedy(columns_of_groups, count)
    found[ids] = np.where(first < 0, -1, ids[first])
    return found


def _groups(keys_D: np.ndarray) -> tuple[np.ndarray, int]:
    """For each key the number int32 `[D]` of its group of equal ones, -1 where it is alone; and how many groups there are."""
    order = np.argsort(keys_D)
    same = np.zeros(len(keys_D) + 1, bool)
    same[1:-1] = keys_D[order[1:]] == keys_D[order[:-1]]
    with_last, with_next = same[:-1], same[1:]
    number = np.cumsum(with_next & ~with_last, dtype=np.int32)
    shared = with_last | with_next
    found = np.full(len(keys_D), -1, np.int32)
    found[order[shared]] = number[shared] - 1
    return found, int(number[-1]) if len(number) else 0


def _greedy(columns: list[np.ndarray], count: int) -> np.ndarray:
    """For each document int64 `[D]` the first that stays and is in one of its groups int32 `[D]`; -1 if there is none."""
    owner = array.array("i", [-1]) * count
    found = np.full(len(columns[0]), -1, np.int64)
    for at in range(0, len(found), _ROWS):
        rows_DB = np.stack([column[at : at + _ROWS] for column in columns], 1)
        some = np.flatnonzero((rows_DB >= 0).any(1))
        for document, row in zip((some + at).tolist(), rows_DB[some].tolist(), strict=True):
            own = [group for group in row if group >= 0]
            owners = [owner[group] for group in own if owner[group] >= 0]
            if owners:
                found[document] = min(owners)
            else:
                for group in own:
                    owner[group] = document
    return found


@functools.cache
def _factors(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(count)).integers(1 << 32, 1 << 63, count, np.uint64) | np.uint64(1)


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and numbers to xor, uint32 `[count]` each: x → (x · factor) xor number is a permutation of 32 bits."""
    drawn = np.random.Generator(np.random.PCG64(20240625)).integers(0, 1 << 32, (2, count), np.uint64).astype(np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]
