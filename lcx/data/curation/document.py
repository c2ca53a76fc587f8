"""A document and what filters measure in it, each measure computed once and only if asked for.

A document of more than `PASSAGE_BYTES` is measured passage by passage, so that the memory needed does not grow with it: counts are
summed, and duplicates are counted within a passage. Legend: C characters, W words.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator

import numpy as np

from lcx.data.curation import words
from lcx.data.curation.settings import C4Settings

PASSAGE_BYTES = 4 << 20
ENDS = frozenset(".!?…。！？।۔؟։።။។")
"""What ends a sentence, in many scripts."""
_CLOSERS = "\"'”’»)]*_」』）"
_BULLETS = frozenset("•-*‣●○■–")
_SENTENCE = re.compile(rf"[{re.escape(''.join(sorted(ENDS)))}]+[{re.escape(_CLOSERS)}]*(?=\s|$)|[。！？]")
_C4_ENDS = (*sorted(ENDS - {"…"}), *"\"'”’»」』")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines that are not blank, counted; characters are those between the first and the last that is not white space."""

    lines: int = 0
    chars: int = 0
    newlines: int = 0
    bullets: int = 0
    ellipses: int = 0


@dataclasses.dataclass(frozen=True)
class Repeats:
    """Lines and paragraphs that occurred before, and the characters in them."""

    duplicates: int = 0
    duplicate_chars: int = 0
    paragraphs: int = 0
    duplicate_paragraphs: int = 0
    duplicate_paragraph_chars: int = 0


@dataclasses.dataclass(frozen=True)
class Counts:
    """Words, and the signs that are counted per word, as `lcx.data.curation.words.Words` defines them."""

    chars: int = 0
    runs: int = 0
    named_runs: int = 0
    lettered_runs: int = 0
    word_chars: int = 0
    hash_signs: int = 0
    ellipses: int = 0


class Passage:
    """A part of a document's text, cut at white space, with what several measures need."""

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def words(self) -> words.Words:
        """The words of the passage."""
        return words.split(self.text)

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines without the white space around them, without blank ones."""
        return list(filter(None, map(str.strip, self.text.split("\n"))))


class Document:
    """One document: `text` is UTF-8, `name` says where it comes from. Raises `UnicodeDecodeError` if the text is not UTF-8."""

    def __init__(self, name: str, text: bytes) -> None:
        self.name, self.text = name, text
        self._only = Passage(text.decode()) if len(text) <= PASSAGE_BYTES else None
        if self._only is None:
            for passage in self.passages():
                del passage

    def passages(self) -> Iterator[Passage]:
        """The document in passages of at most `PASSAGE_BYTES`."""
        if self._only is not None:
            yield self._only
            return
        at = 0
        while at < len(self.text):
            end = _cut(self.text, at)
            yield Passage(self.text[at:end].decode())
            at = end

    @functools.cached_property
    def counts(self) -> Counts:
        """Words and signs."""
        return _total(Counts, map(_count, self.passages()))

    @functools.cached_property
    def lines(self) -> Lines:
        """Lines."""
        return _total(Lines, map(_count_lines, self.passages()))

    @functools.cached_property
    def repeats(self) -> Repeats:
        """Repeated lines and paragraphs."""
        return _total(Repeats, map(_count_repeats, self.passages()))

    @functools.cached_property
    def top_ngrams(self) -> tuple[float, ...]:
        """Share of the characters in all occurrences of the most frequent sequence of 2, 3 and 4 words; 0 if none occurs twice."""
        return self._repetition[0]

    @functools.cached_property
    def duplicate_ngrams(self) -> tuple[float, ...]:
        """Share of the characters in words of a sequence of 5, …, 10 words that occurred before."""
        return self._repetition[1]

    @functools.cached_property
    def _repetition(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        chars = np.zeros(9, np.int64)
        for passage in self.passages():
            chars += repeated_chars(passage.words.hashes, passage.words.lengths)
        shares = (chars / max(1, self.counts.chars)).tolist()
        return tuple(shares[:3]), tuple(shares[3:])

    def punctuated_lines(self) -> int:
        """Lines that end in the end of a sentence."""
        return sum(sum([line[-1] in ENDS or ended(line) for line in passage.lines]) for passage in self.passages())

    def short_lines(self, below: int) -> int:
        """Lines of fewer than `below` characters."""
        return sum(sum([len(line) < below for line in passage.lines]) for passage in self.passages())

    def holds(self, some: tuple[str, ...]) -> int:
        """How many of some words occur."""
        wanted = _single_words(some)
        missing = set(wanted)
        for passage in self.passages():
            missing -= {one for one in missing if (passage.words.hashes == one).any()}
        return len(wanted) - len(missing)

    def mentions(self, what: str) -> bool:
        """Whether some lower-case ASCII text occurs, in any case of letters."""
        wanted = what.encode()
        starts = range(0, len(self.text), PASSAGE_BYTES)
        return any(wanted in self.text[at : at + PASSAGE_BYTES + len(wanted) - 1].lower() for at in starts)

    def has_sentences(self, enough: int, settings: C4Settings) -> bool:
        """Whether the lines that C4 keeps hold at least `enough` sentences."""
        found = 0
        for passage in self.passages():
            for line in passage.lines:
                if found >= enough:
                    return True
                found += c4_sentences(line, settings)
        return found >= enough

    def word_hashes(self, overlap: int) -> Iterator[np.ndarray]:
        """Hashes uint64 `[W]` of the words, passage by passage; each begins with the last `overlap` words of the one before."""
        before = np.zeros(0, np.uint64)
        for passage in self.passages():
            hashes = np.concatenate([before, passage.words.hashes]) if len(before) else passage.words.hashes
            yield hashes
            before = hashes[max(0, len(hashes) - overlap) :]

    @functools.cached_property
    def digest(self) -> bytes:
        """Eight bytes that are the same for texts which differ in white space and in upper and lower case alone."""
        found = hashlib.blake2b(digest_size=8)
        for i, passage in enumerate(self.passages()):
            found.update((b" \0\0\0" if i else b"") + passage.words.collapsed)
        return found.digest()


@functools.lru_cache(maxsize=64)
def _single_words(some: tuple[str, ...]) -> frozenset[np.uint64]:
    """Hashes of those that are one word."""
    return frozenset(found[0] for one in some if len(found := words.split(one).hashes) == 1)


def ended(line: str) -> bool:
    """Whether a line, without white space around it, ends in the end of a sentence, maybe inside quotation marks or brackets."""
    last = line[-1]
    return last in ENDS or (last in _CLOSERS and line.rstrip(_CLOSERS).endswith(tuple(ENDS)))


def c4_sentences(line: str, settings: C4Settings) -> int:
    """Sentences in a line; none in one that C4 removes."""
    if settings.line_ends and (not line.endswith(_C4_ENDS) or line.endswith("...")):
        return 0
    if settings.min_line_words is not None and len(line.split()) < settings.min_line_words:
        return 0
    lowered = line.lower()
    if settings.javascript and "javascript" in lowered or settings.policies and any(one in lowered for one in _POLICIES):
        return 0
    return max(1, len(_SENTENCE.findall(line)))


def repeated_chars(hashes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Characters int64 `[9]`: in the most frequent sequence of 2, 3 and 4 words, and in words of repeated sequences of 5, …, 10.

    A sequence of n words can only repeat where the sequences of n − 1 words in it do, so few are left to sort after the first.
    """
    found = np.zeros(9, np.int64)
    total = np.concatenate([[0], np.cumsum(lengths)])
    candidates: np.ndarray | None = None
    keys = hashes
    for n in range(2, 11):
        keys = words.longer(keys, hashes, n)
        if not len(keys):
            break
        if candidates is None:
            candidates = np.arange(len(keys))
        else:
            often = np.zeros(len(keys) + 2, bool)
            often[candidates] = True
            candidates = np.flatnonzero(often[: len(keys)] & often[1 : len(keys) + 1])
        order, same = _grouped(keys[candidates], candidates)
        if not same.any():
            break
        if n < 5:
            found[n - 2] = _most_frequent(order, same, total, n)
        else:
            covered = np.zeros(len(hashes) + 1, np.int32)
            repeats = order[1:][same]
            covered[repeats] += 1
            covered[repeats + n] -= 1
            found[n - 2] = lengths[np.cumsum(covered[:-1]) > 0].sum()
        candidates = order[np.concatenate([same, [False]]) | np.concatenate([[False], same])]
    return found


def _grouped(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places sorted by key, equal keys in order of place, and whether each but the first has the key of the one before it.

    Key and place share 64 bits, so that plain numbers are sorted: two of a million keys are confused in one case of a million.
    """
    bits = np.uint64(max(1, int(places[-1]).bit_length()) if len(places) else 1)
    low = (np.uint64(1) << bits) - np.uint64(1)
    packed = (words.mix(keys) & ~low) | places.astype(np.uint64)
    packed.sort()
    top = packed >> bits
    return (packed & low).astype(np.int64), top[1:] == top[:-1]


def _most_frequent(order: np.ndarray, same: np.ndarray, total: np.ndarray, n: int) -> int:
    """Characters, with spaces between words, in all occurrences of the most frequent sequence; of several, of the first."""
    bounds = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
    firsts, counts = bounds[:-1], bounds[1:] - bounds[:-1]
    most = int(counts.max())
    first = int(order[firsts[counts == most]].min())
    return most * int(total[first + n] - total[first] + n - 1)


def _count(passage: Passage) -> Counts:
    found, text = passage.words, passage.text
    ellipses = text.count("...") + text.count("…")
    return Counts(len(text), found.runs, found.named_runs, found.lettered_runs, int(found.lengths.sum()), text.count("#"), ellipses)


def _count_lines(passage: Passage) -> Lines:
    lines = passage.lines
    return Lines(
        lines=len(lines),
        chars=sum(map(len, lines)),
        newlines=passage.text.count("\n"),
        bullets=sum([line[0] in _BULLETS for line in lines]),
        ellipses=sum([line.endswith(("...", "…")) for line in lines]),
    )


def _count_repeats(passage: Passage) -> Repeats:
    text = passage.text.replace("\r\n", "\n") if "\r" in passage.text else passage.text
    paragraphs = list(filter(None, map(str.strip, text.split("\n\n"))))
    distinct_lines, distinct = set(passage.lines), set(paragraphs)
    return Repeats(
        duplicates=len(passage.lines) - len(distinct_lines),
        duplicate_chars=sum(map(len, passage.lines)) - sum(map(len, distinct_lines)),
        paragraphs=len(paragraphs),
        duplicate_paragraphs=len(paragraphs) - len(distinct),
        duplicate_paragraph_chars=sum(map(len, paragraphs)) - sum(map(len, distinct)),
    )


def _total(cls, parts):
    total = [0] * len(dataclasses.fields(cls))
    for part in parts:
        total = [a + b for a, b in zip(total, vars(part).values(), strict=True)]
    return cls(*total)


def _cut(text: bytes, at: int) -> int:
    """Where the passage that begins at `at` ends: behind its last line break, else its last space, else between two characters."""
    end = at + PASSAGE_BYTES
    if end >= len(text):
        return len(text)
    for mark in (b"\n", b" "):
        if (found := text.rfind(mark, at + PASSAGE_BYTES // 2, end)) >= 0:
            return found + 1
    while end > at + 1 and text[end] & 0xC0 == 0x80:
        end -= 1
    return end
