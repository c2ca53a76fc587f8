"""What a folder's files should be: their sizes and checksums in `checksums.json`, written last and compared on reading.

{"format": 1, "files": {"model.safetensors": {"bytes": 8, "xxh3_128": "99aa06d3014798d86001c324468d497f"}}, "self": "..."}

`self` is the checksum of `files`. A file too large to be read again at once has a size only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from lcx.core.errors import UserError
from lcx.core.files import write_atomically

NAME = "checksums.json"
FORMAT, HASH = 1, "xxh3_128"
LARGE = 1 << 24
"""Bytes from which on a checksum is remembered for the time of a process."""

_BLOCK = 1 << 20
_LEFT_OUT = (".lock", ".partial")


class DamagedError(UserError):
    """Something stored is not what was written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest at `path`; `files`: name from its folder on, with slashes -> bytes, and the checksum if there is one."""

    path: Path
    files: Mapping[str, tuple[int, str | None]]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.path.parent

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(size for size, _ in self.files.values())

    def fault(self, name: str, least: bool = False) -> str | None:
        """What is wrong with one of its files, as the end of a sentence; None if nothing is. `least`: compare sizes only."""
        size, wanted = self.files[name]
        try:
            found = (self.folder / name).stat()
        except OSError:
            return "is missing"
        if found.st_size != size:
            return f"has {found.st_size:,} bytes instead of {size:,}"
        if not least and wanted is not None and file_hash(self.folder / name) != wanted:
            return "has other contents than were written"
        return None

    def check(self, name: str, least: bool = False) -> None:
        """Raises `DamagedError` if something is wrong with one of its files."""
        if fault := self.fault(name, least):
            raise DamagedError(
                f"{self.folder / name} {fault}; put back a whole copy or, if it was changed on purpose, accept it with: "
                f"lcx verify {self.folder} --update"
            )


def write(
    folder: Path,
    names: Iterable[str] | None = None,
    name: str = NAME,
    most: int | None = None,
    given: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Write the manifest `name` of a folder: of the files `names` (None: all that are `listed`) and of those `given` with contents.

    The latter need not be there yet. Of files of more than `most` bytes only the sizes are kept.
    """
    found = sorted(set(listed(folder) if names is None else names) - {name} - set(given or {}))
    files: dict[str, tuple[int, str | None]] = {}
    for one in found:
        size = (folder / one).stat().st_size
        files[one] = (size, None if most is not None and size > most else file_hash(folder / one))
    for one, content in (given or {}).items():
        files[one] = (len(content), xxhash.xxh3_128_hexdigest(content))
    described = {one: {"bytes": size} | ({HASH: digest} if digest else {}) for one, (size, digest) in sorted(files.items())}
    content = {"format": FORMAT, "files": described, "self": _own(described)}
    write_atomically(folder / name, json.dumps(content, indent=1) + "\n")
    return Manifest(folder / name, files)


def listed(folder: Path) -> list[str]:
    """The files below a folder that a manifest of it lists: all but manifests and files of a moment."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((NAME, *_LEFT_OUT)))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def read(path: Path) -> Manifest:
    """A manifest; raises `DamagedError` for one that is missing or not as it was written."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT or content["self"] != _own(content["files"]):
            raise ValueError("its own checksum differs")
        files = {name: (int(of["bytes"]), of.get(HASH)) for name, of in content["files"].items()}
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing; put it back, or have it written anew with: lcx verify {path.parent} --update")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}); put it back, or have it written anew with: lcx verify {path.parent} --update"
        ) from error
    return Manifest(path, files)


def next_to(path: Path) -> Path:
    """Where the manifest of a single file is."""
    return path.with_name(f"{path.name}.{NAME}")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises `DamagedError` for a file that is not as the manifest beside it, of its folder or of the folder above says.

    A file of which none says anything passes.
    """
    path = Path(path).absolute()
    places = ((next_to(path), path.name), (path.parent / NAME, path.name))
    for place, name in (*places, (path.parent.parent / NAME, f"{path.parent.name}/{path.name}")):
        if place.is_file() and name in (manifest := _read_once(_Found(_stamp(place), place))).files:
            manifest.check(name)
            return


def file_hash(path: Path) -> str:
    """XXH3 (128 bits, in hex) of a file's contents; of a large one, once in a process while it stays as it is."""
    found = _Found(_stamp(path), path)
    return _hash(found) if path.stat().st_size < LARGE else _hash_once(found)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A file as it was found, wherever it is moved to."""

    stamp: tuple[int, ...]
    path: Path = dataclasses.field(compare=False)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to, and not when it is renamed."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _hash(found: _Found) -> str:
    hashed, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with found.path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            hashed.update(block[:count])
    return hashed.hexdigest()


_hash_once = functools.lru_cache(maxsize=4096)(_hash)


@functools.lru_cache(maxsize=256)
def _read_once(found: _Found) -> Manifest:
    return read(found.path)


def _own(files: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
