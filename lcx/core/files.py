"""Files that are there whole or not at all: written at once, and not the pointers that Git LFS leaves in their place."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from lcx.core.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file so that it holds all of `content` or, if the process is killed, is left as it was before; its directory is made.

    Text is written as UTF-8.
    """
    with opened_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def opened_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to in pieces; it takes the place of `path` at the end of the body, and is left aside if that raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sampled_hash(files: Sequence[Path], blocks: int = 64, block: int = 4096) -> str:
    """Sixteen hex digits over the names, the sizes and a few blocks of files: quick for any size, other for another model."""
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(blocks):
                file.seek(i * max(0, size - block) // max(1, blocks - 1))
                found.update(file.read(block))
    return found.hexdigest()[:16]


def refuse_lfs_pointer(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` for a file that only says where Git LFS keeps the real one, as a clone without Git LFS has them."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in its repository")
