"""How answers in words are scored: RULER's post-processing and its two ways of looking for references in a prediction."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(prediction: str) -> str:
    """The prediction without space around it, and with every control character as a line break."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def share_contained(prediction: str, references: Sequence[str]) -> float:
    """The share of references that the prediction contains, whatever their case (RULER's `string_match_all`)."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def any_contained(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction contains any of the references, whatever its case (RULER's `string_match_part`)."""
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))


_INTEGER = re.compile(r"-?\d+")


def first_integer(prediction: str) -> str | None:
    """The first run of digits, with its sign, as text; None if there is none."""
    found = _INTEGER.search(prediction)
    return found[0] if found else None


def whole(text: str) -> int:
    """A whole number; of more than 1,000 digits the first ones, as no answer has so many and Python refuses more than 4,300."""
    return int(text[:1000])


def integers(prediction: str) -> list[int]:
    """All whole numbers of the first line that has any."""
    for line in prediction.split("\n"):
        if found := _INTEGER.findall(line):
            return [whole(text) for text in found]
    return []


def near(said: str, wanted: str) -> float:
    """0.75 to the power of the error of a whole number; 0 for anything else (OOLONG)."""
    try:
        return 0.75 ** min(abs(whole(said) - int(wanted)), 10_000)
    except ValueError:
        return 0.0


def last_list(prediction: str) -> set[str]:
    """The words between the last pair of square brackets, or up to the end where the last is not closed."""
    inside = prediction.rpartition("[")[2].partition("]")[0]
    return set(re.findall(r"[\w-]+", inside))


def set_f1(found: set[str], wanted: set[str]) -> float:
    """F1 of two sets; 1 if both are empty, which other harnesses score 0."""
    if not found and not wanted:
        return 1.0
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def word_error_rate(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Edits (insertions, deletions, substitutions) that turn the prediction into the reference, per element of the reference."""
    return edits(prediction, reference) / max(1, len(reference))


def edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein distance, a row at a time."""
    numbers: dict[str, int] = {}
    a, b = (np.asarray([numbers.setdefault(x, len(numbers)) for x in side], np.int64) for side in (one, other))
    row = along = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (b != x))])
        # An insertion costs one more than the best to its left.
        row = np.minimum.accumulate(best - along) + along
    return int(row[-1])
