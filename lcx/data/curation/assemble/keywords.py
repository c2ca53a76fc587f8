"""A keyword for each document, so that documents about one thing can be put together (after Quest, arXiv:2405.19846).

Quest asks a model which queries a document would answer and takes the keyword of one of them. Here no model is asked: a word's
score is (1 + ln count) · ln(D / documents in which it is prominent), TF-IDF over the words that occur most in each document, and of
a document's best words its keyword is the one that most documents share. So documents meet by the words they are full of, not by
what one could ask them; names of characters and modules are frequent keywords. No list of words of any language is used, but
scripts without spaces between words have no keywords.

Legend: D documents.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

from lcx.data.curation.assemble.settings import QuestSettings
from lcx.data.curation.embed import pieces

PROMINENT = 64
"""Words of a document that are looked at."""

PIECE_CHARS = 1 << 20
"""Characters of a long document whose words are listed at once."""

_WORD = re.compile(r"[^\W\d_]{3,}")

Counts = list[tuple[str, int]]
"""Words and how often each occurs."""


def prominent(text: str) -> Counts:
    """The words of at least three letters that occur most, in lower case; of equally frequent ones the first in the alphabet."""
    counts: collections.Counter[str] = collections.Counter()
    for piece in pieces(text, PIECE_CHARS):
        counts.update(map(str.lower, _WORD.findall(piece)))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:PROMINENT]


def choose(documents: Sequence[Counts], settings: QuestSettings) -> list[str | None]:
    """The keyword of each of the D documents, None for one without."""
    spread = collections.Counter(word for counts in documents for word, _ in counts)
    most = settings.max_share * len(documents)
    found: list[str | None] = []
    for counts in documents:
        scores = {
            word: (1 + math.log(count)) * math.log(len(documents) / spread[word])
            for word, count in counts
            if settings.min_documents <= spread[word] <= most
        }
        best = sorted(scores, key=lambda word: (-scores[word], word))[: settings.candidates]
        found.append(min(best, key=lambda word: (-spread[word], -scores[word], word)) if best else None)
    return found
