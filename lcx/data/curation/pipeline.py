"""From sources to curated JSONL files: read, judge each document by itself, compare the rest, write what stays, assemble.

Layout of the folder: `curation.json` (whose folder it is), `SOURCE/00000.jsonl`, … (what stays), `report.json` (written last: where
it is, all is done), and until then `work/`, where each judged shard is kept; a rerun after a kill takes shards from there. Bytes
depend on sources and config alone, never on the number of workers or on interruptions.

Legend: D documents, B buckets.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lcx.core.configs import plain
from lcx.core.errors import UserError
from lcx.core.files import opened_atomically, write_atomically
from lcx.data.curation import contamination
from lcx.data.curation.assemble.stage import assemble
from lcx.data.curation.config import CurationConfig
from lcx.data.curation.duplicates import first_come
from lcx.data.curation.shard import Judged, Shard, Unreadable, judge
from lcx.data.curation.tally import SAMPLE_CHARS, Tally
from lcx.data.curation.workers import ordered
from lcx.data.sources import documents

META, REPORT, WORK, LOCK = "curation.json", "report.json", "work", ".lock"
SHARD_DOCUMENTS = 1 << 14
"""Documents after which a shard ends, however small they are."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What has been judged: shards and bytes of text, those of an earlier start included, and bytes in this start."""

    source: str
    shards: int
    bytes: int
    fresh_bytes: int


def curate(
    config: CurationConfig, out_dir: str | os.PathLike[str], workers: int = 1, report: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Curate the sources into `out_dir` and return the content of its `report.json`.

    `report` is called after every shard. Raises `UserError` for a source without documents, an evaluation file that cannot be
    read, a folder that holds something else or is being written, sources that changed in between, and a disk that is full.
    """
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    folder = pathlib.Path(out_dir).expanduser()
    patterns = config.decontaminate.paths
    forbidden = contamination.collect(patterns, config.decontaminate.ngram) if patterns else None
    identity = {"format": 1, **plain(config), "forbidden": forbidden.fingerprint if forbidden else None}
    try:
        with _claimed(folder, identity):
            if not (folder / REPORT).exists():
                _Curation(config, folder, forbidden, workers, report or (lambda progress: None)).run()
            shutil.rmtree(folder / WORK, ignore_errors=True)
            return json.loads((folder / REPORT).read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}; fix that and rerun the same command, it resumes from there"
        ) from error


class _Curation:
    """One start of the command."""

    def __init__(
        self,
        config: CurationConfig,
        folder: pathlib.Path,
        forbidden: contamination.Forbidden | None,
        workers: int,
        report: Callable[[Progress], None],
    ) -> None:
        self._config, self._folder, self._workers, self._report = config, folder, workers, report
        self._forbidden = forbidden
        self._forbidden_path = folder / WORK / "forbidden.npz"
        self._tallies = {name: Tally(config.samples) for name in config.names}
        self._shards: list[_Stored] = []
        self._bytes = self._fresh = 0

    def run(self) -> None:
        (self._folder / WORK).mkdir(exist_ok=True)
        if self._forbidden is not None:
            self._forbidden.save(self._forbidden_path)
        self._judge()
        duplicates = self._duplicates()
        content = self._content(self._write(duplicates))
        if self._config.assemble:
            config, work = self._config, self._folder / WORK
            content["assembled"] = assemble(config.assemble, config.names, self._folder, work, self._workers, config.shard_bytes)
        write_atomically(self._folder / REPORT, _json(content))

    def _judge(self) -> None:
        """Judge the shards that are not yet in `work/`, and count all of them."""
        asked: collections.deque[tuple[_Stored, str]] = collections.deque()
        for judged in ordered(judge, self._unjudged(asked), self._workers):
            stored, digest = asked.popleft()
            stored.write(judged, digest)
            self._count(stored, fresh=True)
        self._shards.sort(key=lambda stored: (self._config.names.index(stored.source), stored.number))

    def _unjudged(self, asked: collections.deque[tuple[_Stored, str]]) -> Iterator[Shard]:
        """All shards without those in `work/`; `asked` gets the place of each, with the hash of its documents."""
        for name in self._config.names:
            number = 0
            for shard, digest in self._read(name):
                stored = _Stored(self._folder / WORK / name, number)
                if stored.exists():
                    stored.check(digest, name, self._folder)
                    self._count(stored, fresh=False)
                else:
                    asked.append((stored, digest))
                    yield shard
                number += 1
            if _Stored(self._folder / WORK / name, number).exists():
                raise UserError(f"source {name!r} has changed since {self._folder} was started; delete the folder and start again")

    def _read(self, name: str) -> Iterator[tuple[Shard, str]]:
        """A source in shards, each with a hash of its documents."""
        source = self._config.sources[name]
        found: list[tuple[str, bytes] | Unreadable] = []
        digest, size = hashlib.blake2b(digest_size=16), 0

        def refuse(where: str, reason: str, sentence: str) -> None:
            found.append(bad := Unreadable(where, reason, sentence))
            digest.update(repr(bad).encode("utf-8", "replace"))

        def cut() -> tuple[Shard, str]:
            shard = Shard(
                source=name,
                documents=list(found),
                filters=source.settings,
                minhash=self._config.minhash,
                forbidden=None if self._forbidden is None else str(self._forbidden_path),
                min_matches=self._config.decontaminate.min_matches,
                samples=self._config.samples,
            )
            found.clear()
            return shard, digest.hexdigest()

        for one in documents.read(source.source, refuse):
            found.append(one)
            digest.update(one[0].encode("utf-8", "replace") + len(one[1]).to_bytes(8, "little") + one[1])
            size += len(one[1])
            if size >= self._config.shard_bytes or len(found) >= SHARD_DOCUMENTS:
                yield cut()
                size = 0
        if found:
            yield cut()

    def _count(self, stored: _Stored, fresh: bool) -> None:
        tally = stored.meta()["tally"]
        self._tallies[stored.source].add(tally)
        self._shards.append(stored)
        self._bytes += tally["bytes"]
        self._fresh += tally["bytes"] if fresh else 0
        self._report(Progress(stored.source, len(self._shards), self._bytes, self._fresh))

    def _duplicates(self) -> dict[int, tuple[str, int]]:
        """Number of a duplicate, over all shards in order -> the stage that drops it, and the number of the document that stays."""
        files = [np.load(stored.path(".npy"), mmap_mode="r") for stored in self._shards]

        def column(row: int) -> np.ndarray:
            return np.concatenate([file[row] for file in files]) if files else np.zeros(0, np.uint64)

        candidates = np.ones(sum(file.shape[1] for file in files), bool)
        found: dict[int, tuple[str, int]] = {}
        if self._config.exact:
            found |= {one: ("exact", first) for one, first in first_come([column(0)], candidates).items()}
            candidates[list(found)] = False
        if self._config.minhash is not None:
            columns = map(column, range(1, 1 + self._config.minhash.buckets))
            found |= {one: ("minhash", first) for one, first in first_come(columns, candidates).items()}
        return found

    def _write(self, duplicates: dict[int, tuple[str, int]]) -> dict[str, list[int]]:
        """Write what stays, count what does not, and return documents and bytes that stay by source."""
        starts = np.concatenate([[0], np.cumsum([stored.documents for stored in self._shards])]).astype(np.int64)
        kept = {name: [0, 0] for name in self._config.names}
        for stored, first in zip(self._shards, starts.tolist(), strict=False):
            name, meta = stored.source, stored.meta()
            with (
                opened_atomically(self._folder / name / f"{stored.number:05d}.jsonl") as out,
                stored.path(".jsonl").open("rb") as rows,
            ):
                for i, row in enumerate(rows):
                    size = meta["sizes"][i]
                    if (first + i) not in duplicates:
                        out.write(row)
                        kept[name][0] += 1
                        kept[name][1] += size
                        continue
                    stage, other = duplicates[first + i]

                    def details(row: bytes = row, other: int = other) -> dict[str, Any]:
                        shard = int(np.searchsorted(starts, other, side="right")) - 1
                        original = self._shards[shard].meta()["names"][other - starts[shard]]
                        return {"text": json.loads(row)["text"][:SAMPLE_CHARS], "duplicate_of": original}

                    self._tallies[name].dropped(stage, "duplicate", meta["names"][i], size, details)
        return kept

    def _content(self, kept: dict[str, list[int]]) -> dict[str, Any]:
        """The report."""
        sources = {}
        for name in self._config.names:
            tally = self._tallies[name]
            stages = ("read", *self._config.sources[name].filters, "decontaminate", "exact", "minhash", "failed")
            sources[name] = {
                "source": documents.describe(self._config.sources[name].source),
                "read": {"documents": tally.documents, "bytes": tally.bytes},
                "kept": {"documents": kept[name][0], "bytes": kept[name][1]},
                "dropped": tally.summary(stages),
            }
        report: dict[str, Any] = {"format": 1, "sources": sources}
        if self._forbidden is not None:
            report["evaluation"] = {
                "texts": self._forbidden.texts,
                "ngrams": len(self._forbidden.keys),
                "texts_too_short": self._forbidden.short,
            }
        return report


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A judged shard in `work/`; its `.json` is written last and says that the others are whole."""

    folder: pathlib.Path
    number: int

    @property
    def source(self) -> str:
        return self.folder.name

    @property
    def documents(self) -> int:
        return len(self.meta()["sizes"])

    def path(self, suffix: str) -> pathlib.Path:
        return self.folder / f"{self.number:05d}{suffix}"

    def exists(self) -> bool:
        return self.path(".json").exists()

    def meta(self) -> dict[str, Any]:
        return json.loads(self.path(".json").read_bytes())

    def check(self, digest: str, name: str, folder: pathlib.Path) -> None:
        if self.meta()["input"] != digest:
            raise UserError(f"source {name!r} has changed since {folder} was started; delete the folder and start again")

    def write(self, judged: Judged, digest: str) -> None:
        write_atomically(self.path(".jsonl"), judged.rows)
        with opened_atomically(self.path(".npy")) as file:
            np.save(file, judged.keys)
        meta = {"input": digest, "names": judged.names, "sizes": judged.sizes, "tally": judged.tally}
        write_atomically(self.path(".json"), json.dumps(meta, ensure_ascii=True))


@contextlib.contextmanager
def _claimed(folder: pathlib.Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the folder, marked as that of this curation, for the time of the body."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a directory with --out")
    path = folder / META
    known = (LOCK, META + ".partial")
    if not path.exists() and folder.exists() and (foreign := sorted(one.name for one in folder.iterdir() if one.name not in known)):
        raise UserError(f"{folder} contains {foreign[0]!r}, which is not part of a curation; use a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another lcx data curate is writing to {folder}; wait for it to end or use another folder") from error
        there = json.loads(path.read_bytes()) if path.exists() else None
        # A start that judged no shard, because of a wrong path perhaps, leaves the folder to any config.
        begun = (folder / REPORT).exists() or any((folder / WORK).glob("*/*.json"))
        if begun and there is not None and there != identity:
            difference = _difference("config", there, identity)
            raise UserError(f"{folder} holds another curation ({difference}); use a new folder or delete it")
        if there != identity:
            write_atomically(path, _json(identity))
        yield


def _difference(key: str, old: Any, new: Any) -> str:
    """The first value that differs."""
    while isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in {**new, **old} if old.get(name) != new.get(name))
        key, old, new = f"{key}.{name}", old.get(name), new.get(name)
    return f"{key} is {old!r}, not {new!r}"


def _json(content: dict[str, Any]) -> bytes:
    # Names of files may hold bytes that are not UTF-8.
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
