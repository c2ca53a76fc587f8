"""Checkpoints whose damage is seen: how their parts are written with checksums, and read and compared with them.

Orbax commits a checkpoint when all of this is there: arrays, a manifest of the files of each part, and metadata with the checksum
of every array and one of their own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from lcx.core import checksums, configs, manifest
from lcx.core.checksums import ArraySums
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.manifest import DamagedError
from lcx.core.trees import joined
from lcx.training.meta import Meta

PARAMS, PROGRESS = "params", "progress"
"""The parts of a checkpoint: what a model is, and what a run needs to go on besides."""

SUMS, OWN = "checksums", "own_checksum"
"""Keys of the custom metadata: one over the arrays of each part that process 0 wrote, and that of the metadata."""

Sums = Mapping[str, ArraySums]
"""Path of an array within a part -> its checksums."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself. `sealed`: part -> fingerprint of process 0's checksums; None where lcx wrote none yet."""

    meta: Meta
    sealed: dict[str, str] | None


@dataclasses.dataclass
class Examined:
    """What was found of a checkpoint: how many arrays and bytes could be compared, and what is wrong, a phrase each."""

    arrays: int = 0
    bytes: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Summed:
    """A part to be written: its arrays, and the checksums of those of this process."""

    tree: Any
    sums: Sums


OF_PROCESS = "checksums.process_"
"""Begin of the name of a file with the checksums of one process."""

MOST_HASHED = 1 << 20
"""Bytes up to which a file is read again for its checksum. What is longer holds arrays, which have their own."""


class CheckedTree(ocp.handlers.CheckpointableHandler):
    """Orbax's handler of trees, for a `Summed`: each process leaves its checksums, the first a manifest of all files in the end."""

    def __init__(self) -> None:
        self._trees = ocp.handlers.PyTreeHandler()

    async def save(self, directory: Any, checkpointable: Summed) -> Awaitable[None]:
        """Start to write the tree; what comes back is done when the files and their manifest are there."""
        return self._finish(directory, checkpointable.sums, await self._trees.save(directory, checkpointable.tree))

    async def _finish(self, directory: Any, sums: Sums, written: Awaitable[None]) -> None:
        folder = Path(await directory.await_creation())
        content = json.dumps(configs.plain(dict(sums)))
        await asyncio.to_thread(write_atomically, folder / f"{OF_PROCESS}{jax.process_index()}.json", content)
        await written  # by all processes
        if jax.process_index() == 0:
            await asyncio.to_thread(manifest.write, folder, most=MOST_HASHED)

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """As orbax's."""
        return await self._trees.load(directory, abstract_checkpointable)

    async def metadata(self, directory: Any) -> Any:
        """As orbax's."""
        return await self._trees.metadata(directory)

    def is_handleable(self, checkpointable: Any) -> bool:
        """Whether this is a `Summed`."""
        return isinstance(checkpointable, Summed)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """As orbax's."""
        return self._trees.is_abstract_handleable(abstract_checkpointable)


def context(parts: tuple[str, ...]) -> ocp.Context:
    """Orbax's settings under which `parts` of a checkpoint are written so."""
    registry = ocp.handlers.local_registry()
    for part in parts:
        registry.add(CheckedTree, checkpointable_name=part)
    found = ocp.Context()
    found.checkpointables.registry = registry
    return found


def sealed(meta: Meta, trees: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Summed]]:
    """The custom metadata and the parts of a checkpoint of `trees`, part -> arrays, which are read before this returns."""
    parts = {part: Summed(tree, checksums.own_sums(tree)) for part, tree in trees.items()}
    values = json.loads(json.dumps(dataclasses.asdict(meta)))
    values[SUMS] = {part: configs.fingerprint(of.sums) for part, of in parts.items()}
    return {**values, OWN: configs.fingerprint(values)}, parts


def record(checkpointer: ocp.training.Checkpointer, step: int) -> Record:
    """What a checkpoint says of itself; raises `DamagedError` if that is not what was written."""
    values = dict(checkpointer.checkpointables_metadata(step).custom_metadata or {})
    is_sealed, own = OWN in values or SUMS in values, values.pop(OWN, None)
    try:
        if is_sealed and (own != configs.fingerprint(values) or values["step"] != step):
            raise ValueError("their own checksum differs")
        found = values.pop(SUMS, None)
        return Record(Meta(**{**values, "losses": tuple(values["losses"])}), found)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError("its metadata are not what was saved") from error


def names(checkpointer: ocp.training.Checkpointer, step: int, part: str) -> frozenset[str] | None:
    """The paths of the arrays that a part of a checkpoint holds; None for one without checksums."""
    seals = record(checkpointer, step).sealed
    return None if seals is None else frozenset(_sums(Path(checkpointer.directory) / str(step), part, seals))


def load(checkpointer: ocp.training.Checkpointer, step: int, trees: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a checkpoint, in the types and with the shardings of the abstract `trees`, part -> arrays.

    Raises `DamagedError` if an array or a file of these parts is not what was saved, `UserError` if they are whole but of other
    names or shapes, and whatever orbax raises for what it cannot read in a checkpoint without checksums.
    """
    seals = record(checkpointer, step).sealed
    if seals is None:
        return checkpointer.load_checkpointables(step, trees)
    folder = Path(checkpointer.directory) / str(step)
    sums = {part: _sums(folder, part, seals) for part in trees}
    _refuse_others(folder, trees, sums)
    stored = {part: _as_stored(tree, sums[part]) for part, tree in trees.items()}
    try:
        found = checkpointer.load_checkpointables(step, stored)
    except Exception as error:
        bad = _unlike(folder, sums)  # the library does not always say which array it is
        faults = [fault for part in trees for fault in _file_faults(folder, part)]
        if bad or faults:
            raise DamagedError(_found(bad, faults)) from error
        raise
    bad, left = [], dict[str, list[str]]()
    for part in trees:
        compared = checksums.compare(found[part], sums[part])
        bad += [f"{part}/{path}" for path in compared.unlike]
        # Each of these is read once more, by one of the processes, as a whole.
        left[part] = compared.open[jax.process_index() :: jax.process_count()]
    bad = bad or _unlike(folder, sums, left)
    faults = [fault for part in trees for fault in _file_faults(folder, part)]
    if bad or faults:
        raise DamagedError(_found(bad, faults))
    return _cast(found, trees)


def examine(checkpointer: ocp.training.Checkpointer, step: int) -> Examined:
    """Compare all arrays and files of a checkpoint with their checksums, one shard at a time, in host memory."""
    found, folder = Examined(), Path(checkpointer.directory) / str(step)
    try:
        seals = record(checkpointer, step).sealed
        if seals is None:
            return found
        sums = {part: _sums(folder, part, seals) for part in seals}
    except Exception as error:
        found.faults.append(short(error))
        return found
    bad = _unlike(folder, sums)
    faults = [fault for part in seals for fault in _file_faults(folder, part)]
    if bad or faults:
        found.faults.append(_found(bad, faults))
    found.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found.arrays = sum(map(len, sums.values()))
    return found


def _sums(folder: Path, part: str, seals: Mapping[str, str]) -> dict[str, ArraySums]:
    """The checksums of the arrays of a part, of all processes that wrote it; raises `DamagedError` for files of them that are."""
    if part not in seals:
        raise DamagedError(f"it has no {part}, only {' and '.join(seals)}")
    try:
        listed = manifest.read(folder / part / manifest.NAME)
    except DamagedError as error:
        raise DamagedError(f"file {part}/{manifest.NAME} is not what was saved") from error
    found: dict[str, ArraySums] = {}
    for name in sorted(listed.files):
        if name.startswith(OF_PROCESS):
            if fault := listed.fault(name):
                raise DamagedError(f"file {part}/{name} {fault}")
            content = json.loads((folder / part / name).read_bytes())
            read = {path: ArraySums(**{**of, "shape": tuple(of["shape"])}) for path, of in content.items()}
            if name == f"{OF_PROCESS}0.json" and configs.fingerprint(read) != seals.get(part):
                raise DamagedError(f"its metadata are of other arrays than those in {part}")
            found |= {path: found[path].joined(of) if path in found else of for path, of in read.items()}
    return found


def _refuse_others(folder: Path, trees: Mapping[str, Any], sums: Mapping[str, Sums]) -> None:
    """Raises `UserError` if a checkpoint's arrays are not those of the abstract `trees`."""
    for part, tree in trees.items():
        wanted = {joined(at): tuple(x.shape) for at, x in jax.tree_util.tree_leaves_with_path(tree)}
        there = {path: tuple(of.shape) for path, of in sums[part].items()}
        for path in sorted({*wanted, *there}):
            if wanted.get(path) != there.get(path):
                said = (f"of shape {shapes[path]}" if path in shapes else "absent" for shapes in (there, wanted))
                raise UserError(
                    f"checkpoint {folder} is of another model or optimizer: {part}/{path} is {next(said)} there but {next(said)} "
                    "here; use the config that it was written with"
                )


def _unlike(folder: Path, sums: Mapping[str, Sums], chosen: Mapping[str, Collection[str]] | None = None) -> list[str]:
    """Which arrays cannot be read or are not what was saved, each box read by itself into host memory.

    `chosen`: the paths in each part to look at (None: all). Past orbax, whose reads all processes have to take part in.
    """
    bad = []
    for part, arrays in sums.items():
        for path in arrays if chosen is None else chosen[part]:
            try:
                if not checksums.is_like(_stored(folder / part, path), arrays[path]):
                    bad.append(f"{part}/{path}")
            except Exception:
                bad.append(f"{part}/{path}")
    return bad


def _stored(folder: Path, path: str) -> ts.TensorStore:
    """An array where orbax has put it."""
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{path.replace('/', '.')}/"}
    driver = "zarr3" if ts.KvStore.open(kvstore).result().read("zarr.json").result().value else "zarr"
    return ts.open({"driver": driver, "kvstore": kvstore}, open=True, read=True).result()


def _file_faults(folder: Path, part: str) -> list[str]:
    """What is wrong with the files of a part, as its manifest says: sizes, and the contents of small ones."""
    try:
        found = manifest.read(folder / part / manifest.NAME)
    except DamagedError:
        return [f"file {part}/{manifest.NAME} is not what was saved"]
    faults = ((name, found.fault(name)) for name in found.files)
    return [f"file {part}/{name} {fault}" for name, fault in faults if fault]


def _as_stored(tree: Any, sums: Sums) -> Any:
    """Abstract arrays of the types that were written, which may be narrower: checksums are of these."""

    def one(at: tuple[Any, ...], x: Any) -> Any:
        known = sums.get(joined(at))
        return x if known is None else jax.ShapeDtypeStruct(x.shape, known.jax_dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def _cast(found: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Arrays in the types of others; each one given is let go as soon as it is cast."""
    leaves, structure = jax.tree.flatten(found)
    found.clear()
    for i, wanted in enumerate(jax.tree.leaves(like)):
        if leaves[i].dtype != wanted.dtype:
            leaves[i] = leaves[i].astype(wanted.dtype)
    return jax.tree.unflatten(structure, leaves)


def _found(arrays: Sequence[str], faults: Sequence[str]) -> str:
    """Damaged arrays, and what is wrong with files, as the end of a sentence."""
    if not arrays:
        return _some(faults)
    plural = len(arrays) > 1
    named = f"array{'s' * plural} {_some(arrays)} {'are' if plural else 'is'} not what was saved"
    return f"{named}, and {_some(faults)}" if faults else named


def _some(texts: Sequence[str], most: int = 3) -> str:
    """The first few of many."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def short(error: BaseException) -> str:
    """The root cause of an error: the outermost message is about the library's internals."""
    if isinstance(error, DamagedError):
        return str(error)
    while cause := error.__cause__ or error.__context__:
        error = cause
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:60]} ... {text[-95:]}"
