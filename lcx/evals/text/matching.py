"""How answers in words are scored: RULER's post-processing and its two ways of looking for references in a prediction."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
