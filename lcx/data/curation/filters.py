"""Filters: pure functions from a document to None, which keeps it, or the reason why it is dropped.

To add one: its settings in `settings.py`, a function here, and a row in `FILTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lcx.data.curation.document import Document
from lcx.data.curation.settings import (
    C4Settings,
    FilterSettings,
    FineWebSettings,
    GopherQualitySettings,
    GopherRepetitionSettings,
    LengthSettings,
)


def verdict(settings: FilterSettings, document: Document) -> tuple[str, str] | None:
    """The first filter that drops the document and its reason; None if all keep it."""
    for name in settings.filters:
        reason = next(FILTERS[name](getattr(settings, name), document), None)
        if reason is not None:
            return name, reason
    return None


def length(settings: LengthSettings, document: Document) -> Iterator[str]:
    """Reasons why the document is too short or too long."""
    if _below(len(document.text), settings.min_bytes):
        yield "too_short"
    if _above(len(document.text), settings.max_bytes):
        yield "too_long"


def gopher_quality(settings: GopherQualitySettings, document: Document) -> Iterator[str]:
    """Reasons why the document is not made of words and sentences."""
    counts = document.counts
    if _below(counts.named_runs, settings.min_words):
        yield "too_few_words"
    if _above(counts.named_runs, settings.max_words):
        yield "too_many_words"
    mean = counts.word_chars / max(1, counts.named_runs)
    if _below(mean, settings.min_mean_word_length):
        yield "words_too_short"
    if _above(mean, settings.max_mean_word_length):
        yield "words_too_long"
    if _above(counts.hash_signs / max(1, counts.runs), settings.max_symbol_ratio):
        yield "too_many_hash_signs"
    if _above(counts.ellipses / max(1, counts.runs), settings.max_symbol_ratio):
        yield "too_many_ellipses"
    if settings.max_bullet_lines is not None or settings.max_ellipsis_lines is not None:
        lines = document.lines
        if _above(lines.bullets / max(1, lines.lines), settings.max_bullet_lines):
            yield "too_many_bullet_lines"
        if _above(lines.ellipses / max(1, lines.lines), settings.max_ellipsis_lines):
            yield "too_many_ellipsis_lines"
    if _below(counts.lettered_runs / max(1, counts.runs), settings.min_alphabetic_words):
        yield "too_few_alphabetic_words"
    if settings.min_stop_words and document.holds(settings.stop_words) < settings.min_stop_words:
        yield "too_few_stop_words"


def gopher_repetition(settings: GopherRepetitionSettings, document: Document) -> Iterator[str]:
    """Reasons why the document repeats itself too much."""
    limits = (
        settings.max_duplicate_paragraphs,
        settings.max_duplicate_paragraph_chars,
        settings.max_duplicate_lines,
        settings.max_duplicate_line_chars,
    )
    if any(limit is not None for limit in limits):
        repeats, chars = document.repeats, max(1, document.counts.chars)
        if _above(repeats.duplicate_paragraphs / max(1, repeats.paragraphs), settings.max_duplicate_paragraphs):
            yield "duplicate_paragraphs"
        if _above(repeats.duplicate_paragraph_chars / chars, settings.max_duplicate_paragraph_chars):
            yield "duplicate_paragraph_chars"
        if _above(repeats.duplicates / max(1, document.lines.lines), settings.max_duplicate_lines):
            yield "duplicate_lines"
        if _above(repeats.duplicate_chars / chars, settings.max_duplicate_line_chars):
            yield "duplicate_line_chars"
    if settings.max_top_ngram is not None:
        for n, share, limit in zip((2, 3, 4), document.top_ngrams, settings.max_top_ngram, strict=True):
            if _above(share, limit):
                yield f"top_{n}_gram"
    if settings.max_duplicate_ngram is not None:
        for n, share, limit in zip(range(5, 11), document.duplicate_ngrams, settings.max_duplicate_ngram, strict=True):
            if _above(share, limit):
                yield f"duplicate_{n}_grams"


def fineweb(settings: FineWebSettings, document: Document) -> Iterator[str]:
    """Reasons why the document's lines do not look like prose."""
    lines = document.lines
    if not lines.lines:
        yield "no_lines"
    if settings.min_punctuated_lines is not None:
        punctuated = document.punctuated_lines()
        if _below(punctuated / max(1, lines.lines), settings.min_punctuated_lines):
            yield "too_few_punctuated_lines"
    if settings.max_short_lines is not None:
        short = document.short_lines(settings.short_line_chars)
        if _above(short / max(1, lines.lines), settings.max_short_lines):
            yield "too_many_short_lines"
    limit = settings.max_duplicate_line_chars
    if limit is not None and _above(document.repeats.duplicate_chars / max(1, lines.chars), limit):
        yield "duplicate_line_chars"
    if settings.max_newlines_per_word is not None and lines.newlines > settings.max_newlines_per_word * document.counts.named_runs:
        yield "too_many_newlines"


def c4(settings: C4Settings, document: Document) -> Iterator[str]:
    """Reasons why the document would not be in C4."""
    if settings.lorem_ipsum and document.mentions("lorem ipsum"):
        yield "lorem_ipsum"
    if settings.curly_brackets and b"{" in document.text:
        yield "curly_bracket"
    if settings.min_sentences is not None and not document.has_sentences(settings.min_sentences, settings):
        yield "too_few_sentences"


FILTERS: dict[str, Callable[[Any, Document], Iterator[str]]] = {
    "length": length,
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
    "fineweb": fineweb,
    "c4": c4,
}
"""Name of a filter, and of its settings in `FilterSettings` -> the filter."""


def _below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit
