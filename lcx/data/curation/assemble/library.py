"""Curated documents with random access, and what workers find out about them.

The texts of a source lie one behind the other in a file of `work/`, so that any span of any document is one read away, in every
process. What is slow to compute is kept next to it, block by block, and taken from there after a kill.

Legend: D documents, S spans, E dimensions of a vector.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lcx.core.files import opened_atomically, write_atomically
from lcx.data.curation.assemble import chunks, keywords, repository
from lcx.data.curation.workers import ordered

BLOCK_BYTES, BLOCK_SPANS = 1 << 22, 1 << 12
"""A block of work ends with the span that reaches either; it does not depend on the number of workers."""

Texts = Iterator[bytes]


@dataclasses.dataclass(frozen=True)
class Job:
    """Spans of files to read (`file` numbers `paths`), and the row of `JOBS` that works on them."""

    name: str
    setting: Any
    paths: tuple[str, ...]
    file: np.ndarray
    start: np.ndarray
    end: np.ndarray


def perform(job: Job) -> Any:
    """What a worker does with a block."""
    return JOBS[job.name](texts(job), job.setting)


def texts(job: Job) -> Texts:
    """The texts of a job's spans, one after the other."""
    files: dict[int, Any] = {}
    try:
        for number, start, end in zip(job.file.tolist(), job.start.tolist(), job.end.tolist(), strict=True):
            if number not in files:
                files[number] = open(job.paths[number], "rb")  # noqa: SIM115 -- closed below
            files[number].seek(start)
            yield files[number].read(end - start)
    finally:
        for file in files.values():
            file.close()


def _tokens(texts: Texts, tokenizer: str) -> np.ndarray:
    encoder = _tokenizer(tokenizer)
    return np.array([len(encoder.encode(text)) for text in texts], np.int64)


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str):
    from lcx.data.tokenizers import tokenizers  # JAX comes with it, which most workers need not load

    return tokenizers.load(name)


def _vectors(texts: Texts, embedder: str) -> np.ndarray:
    return _embedder(embedder)([text.decode() for text in texts])


@functools.lru_cache(maxsize=1)
def _embedder(name: str):
    from lcx.data.curation import embed

    return embed.load(name)


JOBS: dict[str, Callable[[Texts, Any], Any]] = {
    "tokens": _tokens,
    "vectors": _vectors,
    "words": lambda texts, setting: [keywords.prominent(text.decode()) for text in texts],
    "chunks": lambda texts, most: [chunks.ends(text.decode(), most) for text in texts],
    "references": lambda texts, paths: [
        repository.references(path, text.decode()) for path, text in zip(paths, texts, strict=True)
    ],
}
"""Name -> a function of the texts of a block and a setting."""


class Library:
    """The documents of some curated sources, in the order of the sources and of their files.

    `folder` is that of the curation; `work` is where texts and results are kept.
    """

    def __init__(self, folder: pathlib.Path, sources: Sequence[str], work: pathlib.Path, workers: int) -> None:
        self.sources, self._workers, self._work = tuple(sources), workers, work / ".assemble"
        shelves = [_shelve(folder / name, self._work / "texts" / name) for name in sources]
        self.paths = tuple(str(path) for path, _, _ in shelves)
        self.names: list[str] = [name for _, names, _ in shelves for name in names]
        self.sizes = np.concatenate([sizes for _, _, sizes in shelves]) if shelves else np.zeros(0, np.int64)
        self.source = np.repeat(np.arange(len(shelves)), [len(names) for _, names, _ in shelves])
        self._begins = np.concatenate([np.cumsum(sizes) - sizes for _, _, sizes in shelves]) if shelves else self.sizes

    def __len__(self) -> int:
        return len(self.names)

    def job(self, name: str, setting: Any, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> Job:
        """A block of spans, each `[S]`, for a worker."""
        begin = self._begins[document]
        return Job(name, setting, self.paths, self.source[document], begin + start, begin + end)

    def read(self, document: int, start: int, end: int) -> bytes:
        """The bytes of one span."""
        return next(texts(self.job("", None, *(np.array([value]) for value in (document, start, end)))))

    def run(self, name: str, setting: Any, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> Iterator[Any]:
        """The results of a row of `JOBS` over spans, block by block and in order."""
        blocks = list(_blocks(end - start))
        jobs = (
            self.job(name, setting(block) if callable(setting) else setting, document[block], start[block], end[block])
            for block in blocks
        )
        return ordered(perform, jobs, self._workers if len(blocks) > 1 else 1)

    def whole(self, name: str, setting: Any) -> list[Any]:
        """The results of a row of `JOBS` over whole documents, one for each."""
        spans = np.arange(len(self)), np.zeros(len(self), np.int64), self.sizes
        return list(itertools.chain.from_iterable(self.run(name, setting, *spans)))

    def array(self, name: str, setting: str, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """As `run`, for arrays with a row for each span, concatenated; blocks are kept in `work/`, for whoever asks again."""
        digest = hashlib.blake2b(repr((self.sources, setting)).encode(), digest_size=8)
        for column in (document, start, end):
            digest.update(np.ascontiguousarray(column, np.int64).tobytes())
        folder = self._work / name / digest.hexdigest()
        blocks = list(_blocks(end - start))
        missing = [i for i in range(len(blocks)) if not (folder / f"{i:05d}.npy").exists()]
        jobs = (self.job(name, setting, document[blocks[i]], start[blocks[i]], end[blocks[i]]) for i in missing)
        for i, found in zip(missing, ordered(perform, jobs, self._workers if len(missing) > 1 else 1), strict=True):
            with opened_atomically(folder / f"{i:05d}.npy") as file:
                np.save(file, found)
        return np.concatenate([np.load(folder / f"{i:05d}.npy") for i in range(len(blocks))])


def _blocks(sizes: np.ndarray) -> Iterator[slice]:
    first, total = 0, 0
    for i, size in enumerate(sizes.tolist()):
        total += size
        if total >= BLOCK_BYTES or i + 1 - first >= BLOCK_SPANS:
            yield slice(first, i + 1)
            first, total = i + 1, 0
    if first < len(sizes):
        yield slice(first, len(sizes))


def _shelve(rows: pathlib.Path, shelf: pathlib.Path) -> tuple[pathlib.Path, list[str], np.ndarray]:
    """The file with the texts of a curated source, their names, and their sizes in bytes, int64 `[D]`."""
    path, index = shelf.with_name(f"{shelf.name}.txt"), shelf.with_name(f"{shelf.name}.json")
    if not index.exists():
        names, sizes = [], []
        with opened_atomically(path) as out:
            for row in _rows(sorted(rows.glob("*.jsonl"))):
                text = row["text"].encode()
                out.write(text)
                names.append(row["name"])
                sizes.append(len(text))
        write_atomically(index, json.dumps({"names": names, "sizes": sizes}))
    stored = json.loads(index.read_bytes())
    return path, stored["names"], np.array(stored["sizes"], np.int64)


def _rows(paths: Iterable[pathlib.Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)
