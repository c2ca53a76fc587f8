"""Folders of safetensors files: listing and reading their tensors, in whole or in part, and writing new ones.

Only safetensors files are read: a pickled checkpoint can run code when it is loaded.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.files import refuse_lfs_pointer
from lcx.core.manifest import check_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = "__metadata__"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of floating-point types in safetensors -> names in numpy."""


class Tensors(Protocol):
    """What parameters are read from: tensors by Hugging Face's names, with their shapes, read in pieces.

    `folder` is where they lie, for errors; `open` yields a function from slices, one for each axis, to numbers that are finite.
    """

    folder: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape."""

    def dtype(self, name: str) -> str:
        """numpy's name of the type in which a tensor is read."""

    def open(self, name: str) -> contextlib.AbstractContextManager[Callable[[tuple[slice, ...]], np.ndarray]]:
        """Context manager for reading pieces of a tensor."""


class Shards:
    """The tensors of a model's folder, a file named `single` or indexed shards, opened on demand.

    Raises `UserError` for a folder without safetensors, a broken file, and an index that does not match the contents of the files.
    A file is compared with the folder's manifest, if there is one, when the first of its tensors is read.
    """

    def __init__(self, folder: str | Path, single: str = SINGLE):
        self.folder = Path(folder)
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._starts: dict[Path, dict[str, int]] = {}
        self._checked: set[Path] = set()
        index = self.folder / INDEX
        if single == SINGLE and index.exists():
            self._read_index(index)
        elif (self.folder / single).is_file():
            self._read_headers([self.folder / single])
        else:
            self._none_found(single)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return self._shapes

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._where.values()))

    def dtype(self, name: str) -> str:
        """numpy's name of a tensor's type; raises `UserError` if it is not a floating-point type."""
        stored = self._dtypes[name]
        if stored not in DTYPES:
            raise UserError(
                f"{self._where[name]}: {name} is stored as {stored}, and lcx reads {', '.join(DTYPES)}; "
                "quantised checkpoints must be dequantised first"
            )
        return DTYPES[stored]

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Compare one of every `parts` files with the manifest, from the `part`-th on; the others are compared elsewhere."""
        for path in self.files[part::parts]:
            check_file(path)
        self._checked.update(self.files)

    def _check(self, path: Path) -> None:
        if path not in self._checked:
            check_file(path)
            self._checked.add(path)

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and the byte at which its numbers begin, row after row."""
        path = self._where[name]
        self._check(path)
        if path not in self._starts:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            self._starts[path] = {key: 8 + size + of["data_offsets"][0] for key, of in header.items() if key != METADATA}
        return path, self._starts[path][name]

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, as stored; raises `UserError` if it contains a number that is not finite."""
        with self.open(name) as piece:
            return piece((slice(None),) * len(self._shapes[name]))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Callable[[tuple[slice, ...]], np.ndarray]]:
        """Context manager for reading pieces of a tensor, as stored; raises `UserError` for numbers that are not finite.

        The library maps the whole file, and every page that was read counts as memory of this process until the end of the `with`.
        """
        self.dtype(name)
        self._check(self._where[name])
        with _open(self._where[name]) as file:
            stored = file.get_slice(name)

            def piece(box: tuple[slice, ...]) -> np.ndarray:
                found = stored[box]
                if not finite(found):
                    raise UserError(f"{self._where[name]}: {name} contains NaN or infinity; the file is broken, download it again")
                return found

            yield piece

    def _read_index(self, index: Path) -> None:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wanted = {name: self.folder / file for name, file in where.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is not an index of safetensors files: it needs a 'weight_map' from tensor names to files"
            ) from error
        files = sorted(set(wanted.values()))
        for file in files:
            if file.suffix in PICKLES:
                raise _pickled(file)
            if file.parent != self.folder:
                raise UserError(f"{index} refers to a file outside its folder, {str(file)!r}")
            if not file.exists():
                raise UserError(f"{index} lists {file.name}, which does not exist; download the missing shard")
        self._read_headers(files)
        for name, file in wanted.items():
            if name not in self._where:
                raise UserError(
                    f"{index} lists {name} in {file.name}, which does not contain it; the index is wrong or a shard is outdated"
                )
            if self._where[name] != file:
                raise UserError(f"{index} lists {name} in {file.name}, but it is in {self._where[name].name}; the index is wrong")
        if unlisted := sorted(set(self._where) - set(wanted)):
            raise UserError(f"{index} does not list {some(unlisted)}, which the shards contain; the index is wrong")

    def _read_headers(self, files: Iterable[Path]) -> None:
        twice = []
        for path in files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118, a handle of the library, not a dict
                    found = file.get_slice(name)
                    if name in self._where:
                        twice.append(f"{name} ({self._where[name].name}, {path.name})")
                    self._where[name] = path
                    self._shapes[name] = tuple(found.get_shape())
                    self._dtypes[name] = found.get_dtype()
        if twice:
            raise UserError(f"{self.folder} has duplicate tensors: {some(twice)}; delete shards that do not belong to the model")

    def _none_found(self, single: str) -> None:
        pickled = sorted(path for path in self.folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise _pickled(pickled[0])
        if single != SINGLE:
            raise UserError(f"{self.folder} has no {single}; name a folder with it")
        others = sorted(path.name for path in self.folder.glob("*.safetensors"))
        hint = f"; it contains {some(others)} without {INDEX}" if others else "; fetch the model's weights, too"
        raise UserError(f"{self.folder} has no {SINGLE} and no {INDEX}{hint}")


def write(folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], np.ndarray], max_bytes: int) -> None:
    """Write tensors into shards of at most `max_bytes` (but at least one tensor each), and their index if there are several.

    `sizes` maps names to bytes, in the order of the files; `tensor` returns each one when its shard is written, so that no more
    than one shard is held in memory.
    """
    from safetensors.numpy import save_file

    files = assigned(sizes, max_bytes)
    for file, names in files.items():
        # transformers requires "pt", which says how to interpret the names, not which program wrote them.
        save_file({name: np.ascontiguousarray(tensor(name)) for name in names}, folder / file, metadata={"format": "pt"})
    write_index(folder, files, sum(sizes.values()))


def assigned(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Names of files -> names of the tensors in them: in order, at most `max_bytes` in a file, but at least one tensor each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def write_index(folder: Path, files: Mapping[str, list[str]], total_bytes: int) -> None:
    """Write the index of several files, whose tensors `files` lists; of a single one there is none."""
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> Any:
    safetensors = library("safetensors", str(path))
    try:
        refuse_lfs_pointer(path)
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run arbitrary code when loaded, so lcx does not read it; "
        "save the model with safetensors (transformers: model.save_pretrained)"
    )


def finite(x: np.ndarray) -> bool:
    """Whether all numbers of an array are finite."""
    if x.dtype.itemsize == 2:
        # Infinities and NaNs have an exponent of all ones; numpy has no fast test for these types.
        ones = 0x7F80 if x.dtype == ml_dtypes.bfloat16 else 0x7C00
        return not x.size or int(np.max(x.view(np.uint16) & 0x7FFF)) < ones
    return bool(np.isfinite(x).all())


def some(names: list[str], most: int = 5) -> str:
    """The first few of many names, for an error."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
