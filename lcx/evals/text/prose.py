"""Prose to hide things in: the running Python's own documentation strings, or any text files that the user names."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence

from lcx.core.errors import UserError, naming
from lcx.data.config import SourceConfig
from lcx.data.sources import documents

_DOCSTRING = re.compile(rb'^[ \t]*(?:def|class)\b[^"#]*?:\s*\n?\s*[rR]?"""(.*?)"""|^[rR]?"""(.*?)"""', re.S | re.M)
_SENTENCE_END = re.compile(r"(?<=[.!?])['\")]*\s+(?=[\"'(]?[A-Z])")
_WORD = re.compile(r"""["'(]?[A-Za-z][A-Za-z'-]*["')]?[,;:.!?]?\)?|\d{1,3}[,.]?""")


class Prose:
    """Sentences of text as an endless stream, from which any number of words is taken.

    `digest` changes whenever the text does. Raises `UserError` if there is no sentence at all.
    """

    def __init__(self, sentences: Sequence[str], origin: str) -> None:
        self._sentences = [" ".join(sentence.split()) for sentence in sentences if sentence.strip()]
        if not self._sentences:
            raise UserError(f"{origin} has no text to hide anything in; name other files with evals.questions.prose")
        self._ends = list(itertools.accumulate(len(sentence.split()) for sentence in self._sentences))
        self.origin, self.digest = origin, hashlib.sha256("\n".join(self._sentences).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """How many sentences there are before the first comes again."""
        return len(self._sentences)

    def without(self, words: Sequence[str]) -> Prose:
        """The sentences that hold none of the words, whatever their case, not even as a part of another word."""
        named = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
        return Prose([sentence for sentence in self._sentences if not named.search(sentence)], self.origin)

    def take(self, start: int, words: int) -> list[str]:
        """The sentences from number `start` on, the last one cut so that they have `words` words in total."""
        found: list[str] = []
        at = start % len(self._sentences)
        while words > 0:
            before = self._ends[at - 1] if at else 0
            end = min(bisect.bisect_right(self._ends, before + words), len(self._sentences))
            found += self._sentences[at:end]
            words -= (self._ends[end - 1] - before) if end > at else 0
            at = end % len(self._sentences)
            rest = self._sentences[at].split()
            if 0 < words < len(rest):
                found.append(" ".join(rest[:words]))
                words = 0
        return found


def load(patterns: Sequence[str]) -> Prose:
    """The prose of the text files that match the patterns; without patterns, that of the standard library's documentation."""
    if not patterns:
        return standard_library()
    source = SourceConfig("text", tuple(patterns))
    with naming({"source.path": "evals.questions.prose"}):
        texts = [text.decode("utf-8", "replace") for _, text in documents.read(source)]
    return Prose([sentence for text in texts for sentence in split(text)], documents.describe(source))


def split(text: str) -> list[str]:
    """Sentences of a text; an abbreviation before a capital letter ends one too early, which does no harm here."""
    return _SENTENCE_END.split(" ".join(text.split()))


@functools.cache
def standard_library() -> Prose:
    """Sentences from the documentation strings of the standard library, those left out that hold code or tables."""
    found = dict.fromkeys(
        sentence
        for _, text in documents.read(SourceConfig("stdlib"))
        for match in _DOCSTRING.finditer(text)
        for sentence in _prose((match[1] or match[2]).decode("utf-8", "replace"))
    )
    return Prose(list(found), "the standard library's documentation")


def _prose(docstring: str) -> Iterator[str]:
    """The sentences of a docstring of at least six words and nothing else, from a capital letter to a full stop."""
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(docstring)):
        for sentence in split(paragraph):
            words = sentence.split()
            if len(words) >= 6 and words[0][:1].isupper() and sentence[-1] in ".!?" and all(map(_WORD.fullmatch, words)):
                yield sentence
