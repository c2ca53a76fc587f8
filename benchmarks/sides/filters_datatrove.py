"""The peer in the benchmark of filters: datatrove's, with the defaults that it publishes and its English tokenizer (spaCy's rules).

A case with `same_words` gives it lcx's idea of a word and of the end of a line instead, so that the rules alone are compared.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    c4_filters,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)
from filters_side import serve

LINE_ENDS = ".!?…。！？"
CLOSERS = "\"'”’»)]*_」』）"
FILTERS = {
    "gopher_quality": GopherQualityFilter(),
    "gopher_repetition": GopherRepetitionFilter(),
    "fineweb": FineWebQualityFilter(),
    "c4": C4QualityFilter(),
}


def take_words_of_lcx() -> None:
    """Gopher's and FineWeb's words are runs without white space, those of repetition runs of letters and digits in lower case."""
    gopher_quality_filter.split_into_words = lambda text, language: text.split()
    fineweb_quality_filter.split_into_words = lambda text, language: [run for run in text.split() if re.search(r"[^\W_]", run)]
    gopher_repetition_filter.split_into_words = lambda text, language: re.findall(r"[^\W_]+", text.lower())
    ends = [end + closer for end in LINE_ENDS for closer in ("", *CLOSERS, *(a + b for a in CLOSERS for b in CLOSERS))]
    FILTERS["fineweb"] = FineWebQualityFilter(stop_chars=tuple(ends))
    c4_filters.END_PUNCTUATION = (*".!?。！？", *"\"'”’»」』")


def judge(text: str, names: tuple[str, ...]) -> str | None:
    document = Document(text=text, id="")
    for name in names:
        found = FILTERS[name].filter(document)
        if found is not True:
            return f"{name}:{found[1] if isinstance(found, tuple) else 'dropped'}"
    return None


if __name__ == "__main__":
    if json.loads(sys.argv[1]).get("same_words"):
        take_words_of_lcx()
    serve(judge, {name: importlib.metadata.version(name) for name in ("datatrove", "spacy", "nltk")})
