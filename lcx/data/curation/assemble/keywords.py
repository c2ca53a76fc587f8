"""A keyword for each document, so that documents about one thing can be put together (after Quest, arXiv:2405.19846).

Quest asks a model which queries a document would answer and takes the keyword of one of them. Here no model is asked: a word's
score is (1 + ln count) · ln(D / documents in which it is prominent), TF-IDF over the words that occur most in each document, and
the best words of a document are its candidates. The word whose documents have most text is taken first, with all of them that fill
documents of the target; then the one with most text among the rest, and so on. So documents meet by the words they are full of, not
by what one could ask them; names of characters and modules are frequent keywords. No list of words of any language is used, but
scripts without spaces between words have no keywords.

Legend: D documents.
"""

from __future__ import annotations

import collections
import heapq
import math
import re
from collections.abc import Callable, Sequence

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


def candidates(documents: Sequence[Counts], settings: QuestSettings) -> list[list[str]]:
    """The words that each of the D documents may be put together by, the best first; empty for one without."""
    spread = collections.Counter(word for counts in documents for word, _ in counts)
    most = settings.max_share * len(documents)
    found: list[list[str]] = []
    for counts in documents:
        scores = {
            word: (1 + math.log(count)) * math.log(len(documents) / spread[word])
            for word, count in counts
            if settings.min_documents <= spread[word] <= most
        }
        found.append(sorted(scores, key=lambda word: (-scores[word], word))[: settings.candidates])
    return found


def by_text(words: Sequence[Sequence[str]], lengths: Sequence[int], target: int, use: Callable[[list[int]], list[int]]) -> None:
    """Offer the documents of each word to `use`, those of the word with most text first, as long as they have `target` in all.

    `words` are the candidates of each document. `use` gets the numbers of documents, rising, and returns those that it has used,
    which are not offered again. Of words with as much text the first in the alphabet comes first, and each comes once.
    """
    holders: dict[str, list[int]] = {}
    for number, own in enumerate(words):
        for word in own:
            holders.setdefault(word, []).append(number)
    used: set[int] = set()
    heap = [(-sum(lengths[number] for number in own), word) for word, own in holders.items()]
    heapq.heapify(heap)
    while heap:
        known, word = heapq.heappop(heap)
        rest = [number for number in holders[word] if number not in used]
        total = sum(lengths[number] for number in rest)
        if total < target:
            continue
        if total < -known:
            # Some have been used by another word in the meantime; others may come first now.
            heapq.heappush(heap, (-total, word))
        else:
            used.update(use(rest))
