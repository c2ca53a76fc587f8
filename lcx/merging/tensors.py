"""One tensor of several models in blocks of rows, read from their files into float32 without mapping them.

R: rows, the product of all axes but the last; C: columns, the last axis. A tensor of one axis is a single row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from lcx.core.errors import UserError
from lcx.core.host import cores, keep_freed_memory
from lcx.interop.shards import Shards, finite

T = TypeVar("T")

BLOCK = 1 << 18
"""Numbers of a tensor that are worked on at a time: a few such blocks fit into the caches of a core."""

THREADS = 2
"""Blocks that are worked on at the same time, on a machine with as many cores."""


Rows = Callable[[int, int], np.ndarray]
"""One model's rows of a tensor, from the first up to the second: float32 (float64 where stored so) `[rows, C]`, the caller's."""


class Reader:
    """A folder's tensors, read in blocks of rows by any number of threads.

    Raises `UserError` for what `Shards` refuses, and for a number that is not finite, with the tensor's name.
    """

    def __init__(self, folder: str | Path):
        self.shards = Shards(folder)
        self._files: dict[Path, int] = {}

    def rows(self, name: str) -> Rows:
        """Reads the rows of a tensor."""
        path, offset = self.shards.place(name)
        dtype = np.dtype(self.shards.dtype(name))
        columns = shape_of(self.shards.shapes[name])[1]
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        file = self._files[path]

        def read(start: int, stop: int) -> np.ndarray:
            found = np.empty((stop - start, columns), dtype)
            _fill(file, found, offset + start * columns * dtype.itemsize, path)
            if not finite(found):
                raise UserError(f"{path}: {name} contains NaN or infinity; the file is broken, download it again")
            return found if dtype == np.float64 else found.astype(np.float32, copy=False)

        return read

    def announce(self, name: str) -> None:
        """Have the system begin to read a tensor that will be asked for soon."""
        path, offset = self.shards.place(name)
        size = math.prod(self.shards.shapes[name]) * np.dtype(self.shards.dtype(name)).itemsize
        if path in self._files and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._files[path], offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of one tensor of the base, if there is one, and of each model: `[rows, C]`, from the row `start` on."""

    index: int
    start: int
    base: np.ndarray | None
    models: list[np.ndarray]

    def deltas(self) -> list[np.ndarray]:
        """What each model adds to the base; the models' own numbers are overwritten."""
        assert self.base is not None
        return [np.subtract(model, self.base, out=model) for model in self.models]

    def changed(self, change: np.ndarray) -> np.ndarray:
        """The base with `change` added; the base's own numbers are overwritten."""
        assert self.base is not None
        return np.add(self.base, change, out=self.base)

    def inputs(self) -> list[np.ndarray]:
        """The base, if there is one, and the models."""
        return [*([] if self.base is None else [self.base]), *self.models]


class Tensor:
    """One tensor of a merge: its inputs, and its blocks, which `executor` (None: this thread) works on side by side.

    Blocks do not depend on the number of threads, and what `over` gives is in their order: so a result has the same bits anywhere.
    """

    def __init__(
        self, name: str, shape: Sequence[int], models: Sequence[Rows], base: Rows | None = None, executor: Executor | None = None,
        seed: int = 0,
    ):  # fmt: skip
        self.name, self.shape, self.seed = name, tuple(shape), seed
        self.rows, self.columns = shape_of(shape)
        self.models, self.base = list(models), base
        self._executor = executor
        self._step = max(1, BLOCK // max(1, self.columns))

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return -(-self.rows // self._step) if self.size else 0

    def only(self, model: int) -> Tensor:
        """The same tensor with one of its models alone, so that the others are not read."""
        return Tensor(self.name, self.shape, [self.models[model]], self.base, self._executor, self.seed)

    def block(self, index: int) -> Block:
        """Reads a block."""
        start = index * self._step
        stop = min(self.rows, start + self._step)
        base = None if self.base is None else self.base(start, stop)
        return Block(index, start, base, [model(start, stop) for model in self.models])

    def over(self, work: Callable[[Block], T]) -> Iterator[T]:
        """What `work` makes of each block, in their order; each is asked for when it is needed, or before."""
        each = map if self._executor is None else self._executor.map
        return iter(each(lambda index: work(self.block(index)), range(self.blocks)))

    def total(self, work: Callable[[Block], np.ndarray | int]) -> np.ndarray:
        """The sum over all blocks of what `work` makes of each."""
        return np.asarray(sum(self.over(work), start=np.zeros(())))

    def random(self, model: int, block: int) -> np.random.Generator:
        """Random numbers of one model's block, which depend on seed, tensor name, model and block alone."""
        words = [self.seed, model, block, *self.name.encode()]
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))


def shape_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns `(R, C)` of a tensor's shape; a scalar is one row of one column."""
    return math.prod(shape[:-1]), (shape[-1] if shape else 1)


@contextlib.contextmanager
def threads() -> Iterator[Executor]:
    """The threads that work on blocks; what has not begun when the body raises is left out."""
    keep_freed_memory()
    executor = ThreadPoolExecutor(min(THREADS, cores()))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _fill(file: int, found: np.ndarray, offset: int, path: Path) -> None:
    into = memoryview(found.reshape(-1).view(np.uint8).data)
    while into:
        if not (count := os.preadv(file, [into], offset)):
            raise UserError(f"{path} ends before its last tensor; the file is broken, download it again")
        into, offset = into[count:], offset + count
