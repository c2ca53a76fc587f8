"""Near-duplicates by MinHash (Broder 1997; buckets as in FineWeb, arXiv:2406.17557), and which of several duplicates stays.

Legend: D documents, W words, K n-grams, B buckets.
"""

from __future__ import annotations

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


def first_come(columns: Iterable[np.ndarray], candidates: np.ndarray) -> dict[int, int]:
    """Duplicate -> the document it duplicates: each shares a key with an earlier document that stays.

    `columns` are keys uint64 `[D]`, a column per bucket; `candidates` bool `[D]` says which documents take part. Documents are in
    the order in which the first stays. One that shares a key with nothing but dropped documents stays too.
    """
    members, groups, count = [], [], 0
    ids = np.flatnonzero(candidates)
    for column in columns:
        keys = column[ids]
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        group = np.cumsum(np.concatenate([[True], ~same])[: len(order)]) + count
        shared = np.concatenate([same, [False]])[: len(order)] | np.concatenate([[False], same])[: len(order)]
        members.append(ids[order[shared]])
        groups.append(group[shared])
        count += len(order)
    member, group = np.concatenate(members), np.concatenate(groups)
    if not len(member):
        return {}
    order = np.argsort(member, kind="stable")
    return _greedy(member[order], group[order])


def _greedy(member: np.ndarray, group: np.ndarray) -> dict[int, int]:
    """Documents in order, each with the groups it is in: the first of a group that stays owns it."""
    owner: dict[int, int] = {}
    dropped: dict[int, int] = {}
    bounds = np.flatnonzero(np.concatenate([[True], member[1:] != member[:-1]]))
    for first, last in zip(bounds.tolist(), [*bounds[1:].tolist(), len(member)], strict=True):
        document, own = int(member[first]), group[first:last].tolist()
        owners = [owner[one] for one in own if one in owner]
        if owners:
            dropped[document] = min(owners)
        else:
            owner.update(dict.fromkeys(own, document))
    return dropped


@functools.cache
def _factors(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(count)).integers(1 << 32, 1 << 63, count, np.uint64) | np.uint64(1)


@functools.cache
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and numbers to xor, uint32 `[count]` each: x → (x · factor) xor number is a permutation of 32 bits."""
    drawn = np.random.Generator(np.random.PCG64(20240625)).integers(0, 1 << 32, (2, count), np.uint64).astype(np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]
