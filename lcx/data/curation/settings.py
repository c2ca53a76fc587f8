"""Settings of the filters, with the published thresholds as defaults; None leaves a rule out.

A share is a fraction from 0 to 1, of the characters or of the lines, words or paragraphs that the name says. A document exactly at
a threshold is kept. This file imports nothing heavy, because every worker process starts with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lcx.core.configs import choice, not_negative, positive
from lcx.core.errors import UserError

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def check_method(path: str, config: Any, methods: Sequence[str]) -> None:
    """Check `method`, `seed` and `sources` of the settings of a stage that makes sources; each method has its own under its name.

    Raises `UserError` for a method that is unknown, a negative seed, a source that is named twice, and settings of another method.
    """
    choice("method", config.method, methods)
    not_negative(path, seed=config.seed)
    if len(set(config.sources)) < len(config.sources):
        raise UserError(f"{path}.sources={config.sources} names a source twice; name each once")
    for field in dataclasses.fields(config):
        if field.name in methods and field.name != config.method and getattr(config, field.name) != field.default:
            raise UserError(
                f"{path}.{field.name} has no effect with method={config.method!r}; leave it out or set method={field.name!r}"
            )


def _shares(path: str, settings: object, *names: str) -> None:
    """Raises `UserError` for a share that is not between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        for share in value if isinstance(value, tuple) else (value,):
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"{path}.{name}={value!r} must be a share from 0 to 1, or None to leave the rule out")


@dataclasses.dataclass(frozen=True)
class LengthSettings:
    """Bytes of UTF-8 text that a document may have."""

    min_bytes: int | None = 1
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        positive("length", min_bytes=self.min_bytes, max_bytes=self.max_bytes)
        if self.min_bytes is not None and self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise UserError(f"length.max_bytes={self.max_bytes} is below length.min_bytes={self.min_bytes}; raise it")


@dataclasses.dataclass(frozen=True)
class GopherQualitySettings:
    """Whether a document is made of words and sentences (Gopher, arXiv:2112.11446, table A1).

    Words are runs of characters without white space that hold a letter or digit, and a word's length is its letters and digits.
    `max_symbol_ratio`: `#` signs, and ellipses, per run of characters without white space. `max_bullet_lines`: share of lines that
    begin with a bullet; `max_ellipsis_lines`: that end in an ellipsis. `min_alphabetic_words`: share of such runs with a letter.
    `min_stop_words`: how many of `stop_words` have to occur; None, or other words, for languages other than English.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_symbol_ratio: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = STOP_WORDS

    def __post_init__(self) -> None:
        _shares("gopher_quality", self, "max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words")
        if self.min_stop_words is not None and self.min_stop_words > len(set(self.stop_words)):
            raise UserError(
                f"gopher_quality.min_stop_words={self.min_stop_words} is more than the {len(set(self.stop_words))} words of "
                "gopher_quality.stop_words; name more words, or set it to None"
            )


@dataclasses.dataclass(frozen=True)
class GopherRepetitionSettings:
    """How much of a document repeats itself (Gopher, arXiv:2112.11446, table A1).

    `max_duplicate_lines`, `max_duplicate_paragraphs`: share of the lines and paragraphs that occurred before in the document;
    `..._chars` the share of the characters in them. `max_top_ngram`: share of the characters in all occurrences of the most
    frequent sequence of 2, 3 and 4 words. `max_duplicate_ngram`: share of the characters in words that belong to a sequence of 5 to
    10 words which occurred before.
    """

    max_duplicate_lines: float | None = 0.3
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_line_chars: float | None = 0.2
    max_duplicate_paragraph_chars: float | None = 0.2
    max_top_ngram: tuple[float, float, float] | None = (0.20, 0.18, 0.16)
    max_duplicate_ngram: tuple[float, float, float, float, float, float] | None = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def __post_init__(self) -> None:
        _shares("gopher_repetition", self, *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class FineWebSettings:
    """Whether lines look like prose (FineWeb, arXiv:2406.17557).

    `min_punctuated_lines`: share of lines that end in a sentence's end, with or without quotation marks and brackets behind it.
    `max_short_lines`: share of lines of fewer than `short_line_chars` characters. `max_duplicate_line_chars`: share of characters
    in lines that occurred before, without the white space around lines. `max_newlines_per_word`: line breaks divided by words.
    """

    min_punctuated_lines: float | None = 0.12
    max_short_lines: float | None = 0.67
    short_line_chars: int = 30
    max_duplicate_line_chars: float | None = 0.01
    max_newlines_per_word: float | None = 0.3

    def __post_init__(self) -> None:
        _shares("fineweb", self, "min_punctuated_lines", "max_short_lines", "max_duplicate_line_chars")
        positive("fineweb", short_line_chars=self.short_line_chars)


@dataclasses.dataclass(frozen=True)
class C4Settings:
    """The rules that made C4 of web pages (arXiv:1910.10683, section 2.2), as a decision about the whole document.

    Lines that C4 removes do not count: those of fewer than `min_line_words` words, that do not end in a sentence's end or a closing
    quotation mark or do in an ellipsis (`line_ends`), that mention JavaScript (`javascript`), or with a notice of policies or
    cookies (`policies`). The others must hold `min_sentences`. `lorem_ipsum`, `curly_brackets`: drop documents that hold one, in
    any line, because lines that C4 would have removed stay.
    """

    min_sentences: int | None = 5
    min_line_words: int | None = 3
    line_ends: bool = True
    javascript: bool = True
    policies: bool = True
    lorem_ipsum: bool = True
    curly_brackets: bool = True


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """The filters of a source: `filters` names them in the order in which they are asked; the others hold their settings."""

    filters: tuple[str, ...] = ("length", "gopher_quality", "gopher_repetition", "fineweb", "c4")
    length: LengthSettings = LengthSettings()
    gopher_quality: GopherQualitySettings = GopherQualitySettings()
    gopher_repetition: GopherRepetitionSettings = GopherRepetitionSettings()
    fineweb: FineWebSettings = FineWebSettings()
    c4: C4Settings = C4Settings()


@dataclasses.dataclass(frozen=True)
class MinHashSettings:
    """Near-duplicates by MinHash: documents that agree in all hashes of at least one bucket.

    Two documents whose sets of `ngram` words have the Jaccard index s meet with probability 1 − (1 − s^hashes)^buckets; with 14
    buckets of 8 hashes, as in FineWeb, that is a half at s = 0.72.
    """

    buckets: int = 14
    hashes: int = 8
    ngram: int = 5

    def __post_init__(self) -> None:
        positive("minhash", buckets=self.buckets, hashes=self.hashes, ngram=self.ngram)
