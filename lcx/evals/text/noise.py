"""Five sentences, over and over: text that nobody could take for an answer."""

from __future__ import annotations

import itertools

SENTENCES = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
TEXT = " ".join(SENTENCES)


def lines(sentences: int) -> list[str]:
    """That many sentences, five to a line, the last line shorter where they do not come out even."""
    full, rest = divmod(sentences, len(SENTENCES))
    return [TEXT] * full + [" ".join(itertools.islice(SENTENCES, rest))] * (rest > 0)


def count(lines: int) -> int:
    """How many sentences that many lines have."""
    return lines * len(SENTENCES)
