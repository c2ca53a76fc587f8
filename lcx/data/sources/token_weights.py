"""Loss weights of a prepared dataset's tokens, computed once, in files next to its shards; runs that read the dataset use them.

folder/weights/00000.npy     float16, the weights of that shard's tokens, document after document
folder/weights.json          what they were computed with, and whether all of them are there; written first and last
folder/weights.checksums.json   sizes and checksums of these files, which are read through when the dataset is opened
"""

from __future__ import annotations

import io
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lcx.core import manifest
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.data.sources import records

META, FOLDER = "weights.json", "weights"
MANIFEST = f"weights.{manifest.NAME}"


class TokenWeights:
    """The weights of the tokens of a dataset whose shards have documents of these `lengths`, int64 each."""

    def __init__(self, folder: pathlib.Path, lengths: list[np.ndarray]) -> None:
        self._files = [np.load(path(folder, shard), mmap_mode="r") for shard in range(len(lengths))]
        for shard, (weights, own) in enumerate(zip(self._files, lengths, strict=True)):
            if weights.shape != (own.sum(),):
                raise UserError(
                    f"{path(folder, shard)} has {weights.size:,} weights for {own.sum():,} tokens; delete {folder / FOLDER} and "
                    f"{folder / META}, and prepare them again"
                )
        self._shard = np.repeat(np.arange(len(lengths)), [len(own) for own in lengths])
        self._first = np.concatenate([np.cumsum(own) - own for own in lengths])

    def gather(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Weights float32 of the spans' tokens, one span after the other."""
        spans = zip(self._shard[documents], self._first[documents] + starts, ends - starts, strict=True)
        pieces = [self._files[shard][first : first + size] for shard, first, size in spans]
        return np.concatenate(pieces).astype(np.float32) if pieces else np.zeros(0, np.float32)


def path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    """Where the weights of a shard's tokens are."""
    return folder / FOLDER / f"{shard:05d}.npy"


def find(folder: pathlib.Path, lengths: list[np.ndarray]) -> TokenWeights | None:
    """The weights of a dataset, None without any; raises `UserError` if they are unfinished."""
    try:
        meta = json.loads((folder / META).read_bytes())
    except FileNotFoundError:
        return None
    if not meta["complete"]:
        raise UserError(f"the loss weights in {folder} are unfinished; rerun the same lcx data prepare, or delete {folder / META}")
    if meta.get(records.CHECKED):
        found = manifest.read(folder / MANIFEST)
        for name in found.files:
            found.check(name)
    return TokenWeights(folder, lengths)


def write(
    folder: pathlib.Path,
    identity: Mapping[str, Any],
    shards: list[list[int]],
    weigh: Callable[[int], np.ndarray],
    report: Callable[[int], None] | None = None,
) -> None:
    """Write the weights of the documents of each shard, `weigh(document)` float `[n]`; a rerun keeps the shards that are there.

    `report` is called with the number of shards that are done. Raises `UserError` if the folder has weights of another `identity`.
    """
    file = folder / META
    there = json.loads(file.read_bytes()) if file.exists() else None
    done = json.dumps({**identity, records.CHECKED: True, "complete": True}).encode()
    known = {key: value for key, value in (there or {}).items() if key != records.CHECKED}
    if there is not None and known != {**identity, "complete": there["complete"]}:
        raise UserError(f"{folder} has loss weights of another kind ({there}); delete {file} to replace them, or use a new folder")
    if there is None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        write_atomically(file, json.dumps({**identity, "complete": False}))
    (folder / FOLDER).mkdir(exist_ok=True)
    for shard, documents in enumerate(shards):
        if not path(folder, shard).exists():
            content = io.BytesIO()
            np.save(content, np.concatenate([weigh(document) for document in documents]).astype(np.float16))
            write_atomically(path(folder, shard), content.getvalue())
        if report is not None:
            report(shard + 1)
    names = [path(pathlib.Path(), shard).as_posix() for shard in range(len(shards))]
    manifest.write(folder, names, MANIFEST, given={META: done})
    write_atomically(file, done)
