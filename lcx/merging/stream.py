"""From tensors of several folders to those of a new one, one after the other, in memory that does not depend on their sizes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lcx.core.console import Progress
from lcx.merging.tensors import Reader, Tensor, threads
from lcx.merging.writer import Stored, Writer

MAX_SHARD_BYTES = 5 * 10**9

AHEAD = 2
"""Tensors that the system begins to read before their turn."""

Write = Callable[[int, np.ndarray], None]
"""Takes the first row of a block of the result and its numbers `[rows, C]`, from several threads and in any order."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One tensor of a new folder: what it is called, how it is stored, and what it is made of, as pairs of a folder and a name.

    `make` goes over the blocks of its inputs, which all have its shape, and gives those of the result to a `Write`.
    """

    name: str
    stored: Stored
    models: tuple[tuple[Reader, str], ...]
    base: tuple[Reader, str] | None
    make: Callable[[Tensor, Write], None]

    @property
    def inputs(self) -> list[tuple[Reader, str]]:
        """All that it is made of."""
        return [*self.models, *([] if self.base is None else [self.base])]


def stream(folder: Path, works: Sequence[Work], title: str, max_shard_bytes: int = MAX_SHARD_BYTES, seed: int = 0) -> None:
    """Write the tensors into `folder` in shards of at most `max_shard_bytes`, the index last, with a progress bar called `title`.

    The folder should be one of `interop.folder.created`, which is there whole or not at all. Files of the readers are closed.
    """
    writer = Writer(folder, {work.name: work.stored for work in works}, max_shard_bytes)
    try:
        with threads() as executor, Progress(title, len(works), every=None) as progress:
            done, start = 0, time.perf_counter()
            for i, work in enumerate(works):
                rows = [reader.rows(name) for reader, name in work.models]
                base = None if work.base is None else work.base[0].rows(work.base[1])
                for later in works[i + 1 : i + 1 + AHEAD]:
                    for reader, name in later.inputs:
                        reader.announce(name)
                writer.begin(work.name)
                work.make(Tensor(work.name, work.stored.shape, rows, base, executor, seed), writer.of(work.name))
                writer.finish(work.name)
                done += work.stored.bytes
                speed = f"{done / 1e6 / (time.perf_counter() - start):,.0f} MB/s"
                progress.note(speed)
                progress.advance(speed)
        writer.close()
    finally:
        writer.abandon()
        for reader in {reader for work in works for reader, _ in work.inputs}:
            reader.close()
