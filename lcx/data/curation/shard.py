"""What a worker does: judge the documents of one shard, each by itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from lcx.data.curation import contamination
from lcx.data.curation.document import Document
from lcx.data.curation.duplicates import bucket_keys
from lcx.data.curation.filters import verdict
from lcx.data.curation.rows import row
from lcx.data.curation.settings import FilterSettings, MinHashSettings
from lcx.data.curation.tally import SAMPLE_CHARS, Tally


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A document that the reader could not read, and why: a reason in a word or two, and a sentence."""

    name: str
    reason: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive documents of a source as (name, text), and what could not be read between them, with how to judge them.

    `forbidden`: path of what evaluation files hold (`contamination.load`), None to leave that stage out.
    """

    source: str
    documents: list[tuple[str, bytes] | Unreadable]
    filters: FilterSettings
    minhash: MinHashSettings | None
    forbidden: str | None
    min_matches: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is left of a shard: `rows` are lines of JSONL, `names` and `sizes` (bytes of text) theirs.

    `keys` uint64 `[1 + buckets, D]`: the hash of each text in its first row, MinHash's keys in the others. `tally`: `Tally.state`.
    """

    rows: bytes
    names: list[str]
    sizes: list[int]
    keys: np.ndarray
    tally: dict[str, Any]


def judge(shard: Shard) -> Judged:
    """Judge the documents of a shard; one that makes a stage fail is dropped with the name of the error as its reason."""
    tally = Tally(shard.samples)
    rows, names, sizes, keys = [], [], [], []
    for one in shard.documents:
        if isinstance(one, Unreadable):
            tally.seen(0)
            tally.dropped("read", one.reason, one.name, 0, lambda one=one: {"error": one.sentence[:SAMPLE_CHARS]})
            continue
        name, text = one
        tally.seen(len(text))
        try:
            found = _judged(shard, name, text)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            found = ("failed", type(error).__name__), message
        if isinstance(found, np.ndarray):
            rows.append(row(shard.source, name, text))
            names.append(name)
            sizes.append(len(text))
            keys.append(found)
        else:
            (stage, reason), message = found
            details = {"text": text[: 4 * SAMPLE_CHARS].decode(errors="replace")[:SAMPLE_CHARS]}
            if message:
                details["error"] = message[:SAMPLE_CHARS]
            tally.dropped(stage, reason, name, len(text), lambda details=details: details)
    height = 1 + (shard.minhash.buckets if shard.minhash else 0)
    return Judged(b"".join(rows), names, sizes, np.stack(keys, 1) if keys else np.zeros((height, 0), np.uint64), tally.state())


def _judged(shard: Shard, name: str, text: bytes) -> np.ndarray | tuple[tuple[str, str], str]:
    """The keys of a document that stays; otherwise the stage, the reason and a message of the stage that drops it."""
    try:
        document = Document(name, text)
    except UnicodeDecodeError as error:
        return ("read", "not_utf8"), str(error)
    if (found := verdict(shard.filters, document)) is not None:
        return found, ""
    if shard.forbidden is not None and _forbidden(shard.forbidden).matches(document, shard.min_matches):
        return ("decontaminate", "shares_ngram"), ""
    digest = np.uint64(int.from_bytes(document.digest, "little"))
    if shard.minhash is None:
        return np.array([digest])
    buckets = bucket_keys(shard.minhash, document)
    # A text without words is a near-duplicate of its like alone.
    return np.concatenate([[digest], np.full(shard.minhash.buckets, digest) if buckets is None else buckets])


@functools.lru_cache(maxsize=1)
def _forbidden(path: str) -> contamination.Forbidden:
    return contamination.load(path)
