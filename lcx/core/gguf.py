"""GGUF files: their metadata, and where their tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The reader of the `gguf`
library builds several arrays for each token of a vocabulary, which takes seconds; what tensors look like is the library's (extra
`gguf`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.files import refuse_lfs_pointer

SUFFIX = ".gguf"
MAGIC = b"GGUF"

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a value's type -> its character in `struct`."""
_STRING, _ARRAY = 8, 9
_MAX_AXES = 4


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: `kind` is the number of its type (`gguf.GGMLQuantizationType`), `shape` that of its numbers.

    `stored` is the shape in the file, whose last axis counts bytes for types with blocks, and `numbers` numpy's type there.
    """

    path: Path
    kind: int
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    numbers: str
    offset: int

    def open(self) -> np.ndarray:
        """The stored tensor, mapped into memory."""
        return np.memmap(self.path, self.numbers, mode="r", offset=self.offset, shape=self.stored)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A file, or all parts of a split one: `metadata` by key, arrays as lists, and `tensors` by name."""

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]


def is_gguf(path: str | Path) -> bool:
    """Whether a path means a GGUF file, by its name; it need not exist."""
    return str(path).endswith(SUFFIX) and not Path(path).is_dir()


def stem(path: str | Path) -> str:
    """The name of a model by that of its file, without the number of a part."""
    found = _PART.fullmatch(Path(path).name)
    return found["name"] if found else Path(path).name.removesuffix(SUFFIX)


def read(path: str | Path) -> Gguf:
    """Metadata and places of a GGUF file; for any part of a split one, those of all parts.

    Raises `UserError` for a file that is missing, not GGUF, cut short or damaged, and for parts that are missing or do not belong
    together.
    """
    files = tuple(_parts(Path(path)))
    return _read(Path(path), files, tuple(_stamp(file) for file in files))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@functools.lru_cache(8)
def _read(path: Path, files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> Gguf:
    found = [_File(file) for file in files]
    metadata = found[0].metadata
    tensors: dict[str, Place] = {}
    for file in found:
        count = file.metadata.get("split.count", len(files))
        if count != max(1, len(files)) and not (count == 0 and len(files) == 1):
            raise UserError(
                f"{file.path} is one of {count} parts, and its name says otherwise; "
                f"name the parts <name>-00001-of-{count:05d}{SUFFIX} and so on"
            )
        if twice := sorted(set(file.places) & set(tensors)):
            raise UserError(
                f"{file.path} holds {twice[0]}, as does {tensors[twice[0]].path.name}; these parts are of different models"
            )
        tensors |= file.places
    wanted = metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise UserError(f"{path} says that its parts hold {wanted} tensors, and they hold {len(tensors)}; download them again")
    return Gguf(path, files, metadata, tensors)


def _parts(path: Path) -> list[Path]:
    """The file, or all parts of a split one in their order."""
    if not path.exists():
        raise UserError(f"{path} does not exist; fetch a GGUF file first, for example with huggingface_hub's `hf download`")
    found = _PART.fullmatch(path.name)
    if not found:
        return [path]
    count = int(found["count"])
    files = [path.with_name(f"{found['name']}-{i + 1:05d}-of-{count:05d}{SUFFIX}") for i in range(count)]
    if missing := [file.name for file in files if not file.exists()]:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{path} is one of {count} parts, and {path.parent} lacks {listed}; download the missing parts")
    return files


class _File:
    """One file, read up to its tensors."""

    def __init__(self, path: Path):
        self.path = path
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            begin = file.read(24)
            if begin[:4] != MAGIC:
                raise UserError(f"{path} is not a GGUF file, as it does not begin with GGUF; download it again, or name another")
            self._size = path.stat().st_size
            if len(begin) < 24:
                raise self._short(24)
            version, tensors, pairs = struct.unpack("<IQQ", begin[4:])
            if version not in (2, 3):
                swapped = int.from_bytes(begin[4:8], "big")
                what = "is big-endian" if swapped in (2, 3) else f"has version {version} of GGUF, and lcx reads 2 and 3"
                raise UserError(f"{path} {what}; convert it again with a current llama.cpp")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
                self._at = 24
                self.metadata: dict[str, Any] = {}
                for _ in range(pairs):
                    key = self._text()
                    self.metadata[key] = self._value(self._number("I"))
                infos = [self._info() for _ in range(tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise self._damaged(f"general.alignment={align!r}")
        start = -(-self._at // align) * align
        self.places = {name: self._place(name, shape, kind, start + offset) for name, shape, kind, offset in infos}

    def _short(self, needed: int) -> UserError:
        return UserError(f"{self.path} is cut short: it has {self._size:,} bytes and needs at least {needed:,}; download it again")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged ({what}); download it again")

    def _take(self, size: int) -> bytes:
        start, end = self._at, self._at + size
        if end > self._size:
            raise self._short(end)
        self._at = end
        return self._data[start:end]

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self) -> str:
        raw = self._take(self._number("Q"))
        return raw.decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"a value of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            form = f"<{_SCALARS[inner]}"
            return np.frombuffer(self._take(count * struct.calcsize(form)), form).tolist()
        if inner not in (_STRING, _ARRAY):
            raise self._damaged(f"an array of type {inner}")
        if count * 8 > self._size - self._at:
            raise self._short(self._at + count * 8)
        return [self._value(inner) for _ in range(count)]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(), self._number("I")
        if axes > _MAX_AXES:
            raise self._damaged(f"{name} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Place:
        library("gguf", str(self.path), "gguf")
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in [known.value for known in GGMLQuantizationType]:
            raise UserError(f"{self.path}: {name} has the type {kind}, which the gguf library does not know; update it with pip")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        plain = {0: "<f4", 1: "<f2", 28: "<f8", 30: "<u2"}.get(kind)
        last = shape[-1] if shape else 1
        if last % block:
            raise self._damaged(f"{name} has rows of {last} numbers in blocks of {block}")
        stored = shape if plain else (*shape[:-1], last // block * size)
        needed = offset + (math.prod(shape) // block) * size
        if needed > self._size:
            raise self._short(needed)
        return Place(self.path, kind, shape, stored, plain or "u1", offset)
