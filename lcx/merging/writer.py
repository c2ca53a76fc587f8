"""Safetensors files of known shapes, written in blocks of rows in any order: headers first, so that nothing is held."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lcx.core.errors import UserError
from lcx.interop.shards import DTYPES, METADATA, assigned, finite, write_index
from lcx.merging.tensors import shape_of

STORED = {name: stored for stored, name in DTYPES.items()}
"""Names of types in numpy -> in safetensors."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Shape of a tensor, and numpy's name of the type in which it is written."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Writer:
    """Writes tensors into shards of at most `max_bytes` (but at least one tensor each) in a folder, and their index at the end.

    `write` may be called by several threads at a time; `finish` when a tensor is complete, in the order of `tensors`, so that files
    are closed as they fill.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Stored], max_bytes: int):
        self._folder, self._tensors = folder, tensors
        self._files = assigned({name: of.bytes for name, of in tensors.items()}, max_bytes)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._starts: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self._left = {file: len(names) for file, names in self._files.items()}
        self._closer = ThreadPoolExecutor(1)
        self._closed: list[Future[None]] = []

    def begin(self, name: str) -> None:
        """Make the file of a tensor, unless it is there."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            _all(self._open[file], self._header(file), 0)

    def of(self, name: str) -> Callable[[int, np.ndarray], None]:
        """`write` for one tensor."""
        return lambda start, rows: self.write(name, start, rows)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Rows of a tensor that has begun, from the row `start` on; raises `UserError` if its type cannot hold a number."""
        of = self._tensors[name]
        columns = shape_of(of.shape)[1]
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(rows, np.dtype(of.dtype))
        if not finite(found):
            reach = f"has merged numbers out of range for {of.dtype}; choose another out_dtype"
            raise UserError(f"{name} {reach if finite(rows) else 'has merged numbers that are not finite; change its parameters'}")
        offset = self._starts[name] + start * columns * found.dtype.itemsize
        _all(self._open[self._file_of[name]], found.reshape(-1).view(np.uint8).data, offset)

    def finish(self, name: str) -> None:
        """A tensor is complete."""
        file = self._file_of[name]
        self._left[file] -= 1
        if not self._left[file]:
            self._closed.append(self._closer.submit(_sync, self._open.pop(file)))

    def close(self) -> None:
        """Wait until all that was written is on the disk, and write the index."""
        for one in self._closed:
            one.result()
        assert not self._open and not any(self._left.values())
        write_index(self._folder, self._files, sum(of.bytes for of in self._tensors.values()))

    def abandon(self) -> None:
        """Close the files, complete or not."""
        self._closer.shutdown()
        while self._open:
            os.close(self._open.popitem()[1])

    def _header(self, file: str) -> bytes:
        # transformers requires "pt", which says how to interpret the names, not which program wrote them.
        header: dict[str, object] = {METADATA: {"format": "pt"}}
        offset = 0
        # The widest first, so that each begins at a multiple of its numbers' size.
        for name in sorted(self._files[file], key=lambda name: -np.dtype(self._tensors[name].dtype).itemsize):
            of = self._tensors[name]
            places = [offset, offset + of.bytes]
            header[name] = {"dtype": STORED[of.dtype], "shape": list(of.shape), "data_offsets": places}
            self._starts[name] = offset
            offset += of.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        for name in self._files[file]:
            self._starts[name] += 8 + len(text)
        return len(text).to_bytes(8, "little") + text


def _all(file: int, content: bytes | memoryview, offset: int) -> None:
    content = memoryview(content)
    while content:
        count = os.pwrite(file, content, offset)
        content, offset = content[count:], offset + count


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)
