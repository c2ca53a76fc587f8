"""The folder of a curation: whose it is, and the shards that are kept in `work/` until the end.

A shard's `.json` is written last and says that its `.jsonl` and `.npy` are whole. What later steps compute of a shard (a score, a
table of vectors) is a file of its own next to them, so that a kill loses no more than one shard of one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.core.files import opened_atomically, write_atomically
from lcx.data.curation.shard import Judged

META, REPORT, WORK, LOCK = "curation.json", "report.json", "work", ".lock"
FORMAT = 2
"""Of the folder; to be raised when what is kept in it changes, so that a newer lcx resumes no older start."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A judged shard in `work/`."""

    folder: pathlib.Path
    number: int

    @property
    def source(self) -> str:
        """The name of its source."""
        return self.folder.name

    @property
    def documents(self) -> int:
        """How many documents it holds."""
        return len(self.meta()["sizes"])

    def path(self, suffix: str) -> pathlib.Path:
        """One of its files."""
        return self.folder / f"{self.number:05d}{suffix}"

    def exists(self) -> bool:
        """Whether it has been judged."""
        return self.path(".json").exists()

    def meta(self) -> dict[str, Any]:
        """The hash of its input, names and sizes of its documents, and its tally."""
        return json.loads(self.path(".json").read_bytes())

    def rows(self) -> Iterator[bytes]:
        """Its documents as lines of JSONL."""
        with self.path(".jsonl").open("rb") as rows:
            yield from rows

    def check(self, digest: str, name: str, folder: pathlib.Path) -> None:
        """Raises `UserError` if it was made of other documents."""
        if self.meta()["input"] != digest:
            raise UserError(f"source {name!r} has changed since {folder} was started; delete the folder and start again")

    def write(self, judged: Judged, digest: str) -> None:
        """Keep what was judged."""
        write_atomically(self.path(".jsonl"), judged.rows)
        with opened_atomically(self.path(".npy")) as file:
            np.save(file, judged.keys)
        meta = {"input": digest, "names": judged.names, "sizes": judged.sizes, "tally": judged.tally}
        write_atomically(self.path(".json"), json.dumps(meta, ensure_ascii=True))


@contextlib.contextmanager
def claimed(folder: pathlib.Path, identity: dict[str, Any], late: Sequence[str] = ()) -> Iterator[None]:
    """Hold the folder, marked as that of this curation, for the time of the body.

    Until the report is there, the values of `late` may change from start to start: nothing else in the folder depends on them.
    """
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
        changeable = () if (folder / REPORT).exists() else late
        if begun and there is not None and _without(changeable, there) != _without(changeable, identity):
            difference = _difference("config", _without(changeable, there), _without(changeable, identity))
            raise UserError(f"{folder} holds another curation ({difference}); use a new folder or delete it")
        if there != identity:
            write_atomically(path, to_json(identity))
        yield


def _without(names: Sequence[str], identity: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in names}


def to_json(content: dict[str, Any]) -> bytes:
    """A file of JSON to read; names of files may hold bytes that are not UTF-8."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _difference(key: str, old: Any, new: Any) -> str:
    """The first value that differs."""
    while isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in {**new, **old} if old.get(name) != new.get(name))
        key, old, new = f"{key}.{name}", old.get(name), new.get(name)
    return f"{key} is {old!r}, not {new!r}"


class Documents:
    """The documents of all shards, by number in order, and which of them are `left`, bool `[D]`. `sizes`: int64 `[D]` in bytes."""

    def __init__(self, shards: Sequence[Stored]) -> None:
        self.shards = shards
        metas = [np.array(stored.meta()["sizes"], np.int64) for stored in shards]
        self.starts = np.cumsum([0, *map(len, metas)], dtype=np.int64)
        self.sizes = np.concatenate([np.zeros(0, np.int64), *metas])
        self.left = np.ones(len(self.sizes), bool)

    def source(self, number: int) -> str:
        """A document's source."""
        return self.shards[int(np.searchsorted(self.starts, number, side="right")) - 1].source

    def name(self, number: int) -> str:
        """A document's name."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.shards[shard].meta()["names"][number - self.starts[shard]]

    def of(self, source: str) -> np.ndarray:
        """Numbers int64 of the documents of a source that are left."""
        found = [self.in_shard(shard) for shard, stored in enumerate(self.shards) if stored.source == source]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def in_shard(self, shard: int) -> np.ndarray:
        """Numbers int64 of the documents of a shard that are left."""
        first, end = self.starts[shard : shard + 2]
        return first + np.flatnonzero(self.left[first:end])

    def names(self, source: str) -> list[str]:
        """The names of the documents of a source that are left."""
        found = []
        for shard, stored in enumerate(self.shards):
            if stored.source == source:
                names = stored.meta()["names"]
                found += [names[number - self.starts[shard]] for number in self.in_shard(shard)]
        return found

    def texts(self, shard: int) -> Iterator[tuple[str, str]]:
        """Name and text of the documents of a shard that are left."""
        for keep, row in zip(self.left[self.starts[shard] : self.starts[shard + 1]], self.shards[shard].rows(), strict=True):
            if keep:
                read = json.loads(row)
                yield read["name"], read["text"]


@dataclasses.dataclass(frozen=True)
class Drop:
    """Why a document goes: the stage, the reason, the number of the document that it duplicates, and more for the report."""

    stage: str
    reason: str
    other: int | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class Drops:
    """Which documents go, by number, and why; duplicates are kept as arrays, because there may be millions."""

    def __init__(self) -> None:
        self._duplicates: list[tuple[str, np.ndarray]] = []
        self._others: dict[int, Drop] = {}

    def add_duplicates(self, stage: str, first_D: np.ndarray) -> None:
        """Documents that a stage drops: int64 `[D]`, the number of the document that each duplicates, -1 for the others."""
        self._duplicates.append((stage, first_D))

    def add(self, found: Mapping[int, Drop]) -> None:
        """Other documents."""
        self._others.update(found)

    def get(self, number: int) -> Drop | None:
        """Why a document goes; None if it stays."""
        for stage, first_D in self._duplicates:
            if first_D[number] >= 0:
                return Drop(stage, "duplicate", int(first_D[number]))
        return self._others.get(number)
