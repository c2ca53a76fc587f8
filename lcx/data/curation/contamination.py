"""Sequences of words that evaluation files share with a document.

A file may be JSON or JSONL, whose texts at any depth are read each by itself, or text, and any of them compressed (.gz).
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lcx.core.errors import UserError
from lcx.core.files import opened_atomically
from lcx.data.curation import words
from lcx.data.curation.document import Document
from lcx.data.sources.documents import opened

_PREFILTER_BITS = 22


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """What evaluation files hold: `keys` uint64, sorted, of the sequences of `ngram` words.

    `texts` have been read; the `short` ones among them have fewer words than that and cannot be found in a document.
    """

    ngram: int
    keys: np.ndarray
    texts: int
    short: int

    @functools.cached_property
    def _prefilter(self) -> np.ndarray:
        table = np.zeros(1 << _PREFILTER_BITS, bool)
        table[_top(self.keys)] = True
        return table

    @property
    def fingerprint(self) -> str:
        """Changes with the sequences."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=8).hexdigest()

    def matches(self, document: Document, enough: int) -> bool:
        """Whether the document holds sequences of the evaluation files in at least `enough` places."""
        found = 0
        for hashes in document.word_hashes(self.ngram - 1):
            keys = words.ngrams(hashes, self.ngram)
            keys = keys[self._prefilter[_top(keys)]]
            place = np.searchsorted(self.keys, keys)
            found += int(np.count_nonzero(self.keys[np.minimum(place, len(self.keys) - 1)] == keys)) if len(self.keys) else 0
            if found >= enough:
                return True
        return False

    def save(self, path: pathlib.Path) -> None:
        """Write to a file that `load` reads."""
        with opened_atomically(path) as file:
            np.savez(file, ngram=self.ngram, keys=self.keys, texts=self.texts, short=self.short)


def load(path: str | os.PathLike[str]) -> Forbidden:
    """What `Forbidden.save` wrote."""
    with np.load(path) as stored:
        return Forbidden(int(stored["ngram"]), stored["keys"], int(stored["texts"]), int(stored["short"]))


def collect(patterns: Sequence[str], ngram: int) -> Forbidden:
    """The sequences of `ngram` words in the files that match the patterns.

    Raises `UserError` for a pattern without files and for a file that cannot be read: leaving one out would defeat the purpose.
    """
    keys, texts, short = [np.zeros(0, np.uint64)], 0, 0
    for path in _files(patterns):
        for text in _texts(path):
            found = words.ngrams(words.split(text).hashes, ngram)
            texts, short = texts + 1, short + (len(found) == 0)
            keys.append(found)
            if len(keys) > 4096:
                keys = [np.unique(np.concatenate(keys))]
    return Forbidden(ngram, np.unique(np.concatenate(keys)), texts, short)


def _top(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(64 - _PREFILTER_BITS)).astype(np.int64)


def _files(patterns: Sequence[str]) -> list[pathlib.Path]:
    found: set[pathlib.Path] = set()
    for pattern in patterns:
        matches = [pathlib.Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise UserError(
                f"decontaminate.path={pattern!r} matches no file; name the evaluation's files, or a glob pattern of them"
            )
        found.update(matches)
    return sorted(found)


def _texts(path: pathlib.Path) -> Iterator[str]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    with opened(path) as file:
        try:
            if kind == ".json":
                yield from _strings(json.load(file))
            elif kind == ".jsonl":
                for line in file:
                    if line.strip():
                        yield from _strings(json.loads(line))
            else:
                yield file.read().decode()
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"evaluation file {path} cannot be read ({error}); repair it, or leave it out of decontaminate.path"
            ) from error


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
