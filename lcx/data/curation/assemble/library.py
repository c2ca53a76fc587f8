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

from lcx.core.errors import UserError
from lcx.core.files import opened_atomically, write_atomically
from lcx.data.curation.assemble import chunks, keywords, repository
from lcx.data.curation.embed import Embedder, fitted
from lcx.data.curation.workers import ordered
from lcx.data.tokenizers import tokenizers

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
    return tokenizers.load(name)


JOBS: dict[str, Callable[[Texts, Any], Any]] = {
    "tokens": _tokens,
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

    def tokens(self, tokenizer: str, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How many tokens each span has, int64 `[S]`."""
        folder, blocks = self._kept("tokens", tokenizer, document, start, end)
        missing = [i for i, path in enumerate(blocks) if not (folder / path[0]).exists()]
        jobs = (self.job("tokens", tokenizer, document[blocks[i][1]], start[blocks[i][1]], end[blocks[i][1]]) for i in missing)
        for i, found in zip(missing, ordered(perform, jobs, self._workers if len(missing) > 1 else 1), strict=True):
            _save(folder / blocks[i][0], found)
        return np.concatenate([np.load(folder / path) for path, _ in blocks])

    def vectors(self, embedder: Embedder, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """A vector for each span, float32 `[S, E]`, by an embedder that is fitted to all of them if it is one that fits.

        Computed in this process: tokenizers have threads of their own, and a model may be in use. Raises `UserError` for a document
        without a vector.
        """
        folder, blocks = self._kept("vectors", embedder.fingerprint, document, start, end)
        fit: Embedder | None = None
        for path, block in blocks:
            if (folder / path).exists():
                continue
            if fit is None:
                fit = fitted(embedder, self._decoded(document, start, end))
            names = [self.names[number] for number in document[block].tolist()]
            found = fit(list(self._decoded(document[block], start[block], end[block])), names)
            if np.isnan(found).any():
                name = names[int(np.flatnonzero(np.isnan(found).any(1))[0])]
                raise UserError(f"embedding {embedder.kind!r} has no vector for {name}; add it, or leave the document out")
            _save(folder / path, found)
        return np.concatenate([np.load(folder / path) for path, _ in blocks])

    def _decoded(self, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> Iterator[str]:
        for text in texts(self.job("", None, document, start, end)):
            yield text.decode()

    def _kept(
        self, name: str, setting: str, document: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> tuple[pathlib.Path, list[tuple[str, slice]]]:
        """Where results for spans are kept, for whoever asks again: a folder, and the file and the spans of each block."""
        digest = hashlib.blake2b(repr((self.sources, setting)).encode(), digest_size=8)
        for column in (document, start, end):
            digest.update(np.ascontiguousarray(column, np.int64).tobytes())
        blocks = [(f"{i:05d}.npy", block) for i, block in enumerate(_blocks(end - start))]
        return self._work / name / digest.hexdigest(), blocks


def _save(path: pathlib.Path, found: np.ndarray) -> None:
    with opened_atomically(path) as file:
        np.save(file, found)


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
