"""Checkpoints whose damage is seen: how their parts are written with checksums, and read and compared with them.

Orbax commits a checkpoint when all of this is there: arrays, a manifest of the files of each part, and metadata with the checksum
of every array and one of their own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lcx.core import checksums, manifest
from lcx.core.configs import fingerprint
from lcx.core.manifest import DamagedError
from lcx.core.trees import joined, paths
from lcx.training.meta import Meta

PARAMS, PROGRESS = "params", "progress"
"""The parts of a checkpoint: what a model is, and what a run needs to go on besides."""

SUMS, OWN = "checksums", "own_checksum"
"""Keys of the custom metadata: those of the arrays, and that of the metadata."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint holds besides arrays. `sums`: `part/path` of each array -> its checksum; None where lcx wrote none yet."""

    meta: Meta
    sums: dict[str, str] | None


@dataclasses.dataclass
class Examined:
    """What was found of a checkpoint: how many arrays and bytes could be compared, and what is wrong, a phrase each."""

    arrays: int = 0
    bytes: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


MOST_HASHED = 1 << 20
"""Bytes up to which a file is read again for its checksum. What is longer holds arrays, which have their own."""


class CheckedTree(ocp.handlers.CheckpointableHandler):
    """Orbax's handler of trees, which leaves `checksums.json` in the folder of the part before the checkpoint is committed."""

    def __init__(self) -> None:
        self._trees = ocp.handlers.PyTreeHandler()

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        """Start to write the tree; what comes back is done when the files and their manifest are there."""
        return self._finish(directory, await self._trees.save(directory, checkpointable))

    async def _finish(self, directory: Any, written: Awaitable[None]) -> None:
        await written  # by all processes
        folder = await directory.await_creation()
        if jax.process_index() == 0:
            await asyncio.to_thread(manifest.write, Path(folder), most=MOST_HASHED)

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """As orbax's."""
        return await self._trees.load(directory, abstract_checkpointable)

    async def metadata(self, directory: Any) -> Any:
        """As orbax's."""
        return await self._trees.metadata(directory)

    def is_handleable(self, checkpointable: Any) -> bool:
        """As orbax's."""
        return self._trees.is_handleable(checkpointable)

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


def sealed(meta: Meta, trees: dict[str, Any]) -> dict[str, Any]:
    """The custom metadata of a checkpoint of `trees`, part -> arrays, which are read before this returns."""
    values = json.loads(json.dumps(dataclasses.asdict(meta)))
    values[SUMS] = checksums.tree_sums(trees)
    return {**values, OWN: fingerprint(values)}


def record(checkpointer: ocp.training.Checkpointer, step: int) -> Record:
    """What a checkpoint says of itself; raises `DamagedError` if that is not what was written."""
    values = dict(checkpointer.checkpointables_metadata(step).custom_metadata)
    is_sealed, own = OWN in values or SUMS in values, values.pop(OWN, None)
    if is_sealed and (own != fingerprint(values) or values["step"] != step):
        raise DamagedError("its metadata are not what was saved")
    sums = values.pop(SUMS, None)
    return Record(Meta(**{**values, "losses": tuple(values["losses"])}), sums)


def load(checkpointer: ocp.training.Checkpointer, step: int, trees: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a checkpoint, in the types and with the shardings of the abstract `trees`, part -> arrays.

    Raises `DamagedError` if an array or a file of these parts is not what was saved, and whatever orbax raises for what it cannot
    read in a checkpoint without checksums.
    """
    sums = record(checkpointer, step).sums
    if sums is None:
        return checkpointer.load_checkpointables(step, trees)
    stored = _as_stored(trees, sums)
    try:
        found = checkpointer.load_checkpointables(step, stored)
    except Exception as error:
        # Which array it is the library does not always say. Several processes do not look for it: one alone may have failed.
        bad = [] if jax.process_count() > 1 else _unlike(checkpointer, step, stored, sums)
        faults = [fault for part in trees for fault in _file_faults(checkpointer, step, part)]
        if bad or faults:
            raise DamagedError(_arrays(bad) if bad else _some(faults)) from error
        raise
    if bad := checksums.differing(found, sums):
        raise DamagedError(_arrays(bad))
    if faults := [fault for part in trees for fault in _file_faults(checkpointer, step, part)]:
        raise DamagedError(_some(faults))
    return _cast(found, trees)


def examine(checkpointer: ocp.training.Checkpointer, step: int) -> Examined:
    """Compare all arrays and files of a checkpoint with their checksums, one array at a time, in host memory."""
    found = Examined()
    try:
        sums = record(checkpointer, step).sums
        trees = dict(checkpointer.checkpointables_metadata(step).metadata)
    except Exception as error:
        found.faults.append(short(error))
        return found
    if sums is None:
        return found
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    trees = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), trees)
    bad = [*_unlike(checkpointer, step, trees, sums), *sorted(sums.keys() - {name for name, _ in paths(trees)})]
    for part in trees:
        found.faults += _file_faults(checkpointer, step, part)
    folder = Path(checkpointer.directory) / str(step)
    found.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found.arrays = len(sums)
    found.faults = [*([_arrays(bad)] if bad else []), *found.faults]
    return found


def _unlike(checkpointer: ocp.training.Checkpointer, step: int, trees: dict[str, Any], sums: Mapping[str, str]) -> list[str]:
    """Which arrays cannot be read or do not have their checksum, each read by itself."""
    bad = []
    for part, tree in trees.items():
        for path, _ in paths(tree):
            name = f"{part}/{path}"
            only = jax.tree_util.tree_map_with_path(lambda at, x, path=path: x if joined(at) == path else ocp.PLACEHOLDER, tree)
            try:
                found = dict(paths(checkpointer.load_checkpointables(step, {part: only})[part]))[path]
                whole = checksums.tree_sums({part: {path: found}}) == {name: sums.get(name)}
            except Exception:
                whole = False
            if not whole:
                bad.append(name)
    return bad


def _file_faults(checkpointer: ocp.training.Checkpointer, step: int, part: str) -> list[str]:
    """What is wrong with the files of a part, as its manifest says: sizes, and the contents of small ones."""
    try:
        found = manifest.read(Path(checkpointer.directory) / str(step) / part / manifest.NAME)
    except DamagedError:
        return [f"file {part}/{manifest.NAME} is not what was saved"]
    faults = ((name, found.fault(name)) for name in found.files)
    return [f"file {part}/{name} {fault}" for name, fault in faults if fault]


def _as_stored(trees: dict[str, Any], sums: Mapping[str, str]) -> dict[str, Any]:
    """Abstract arrays of the types that were written, which may be narrower: checksums are of these."""

    def one(at: tuple[Any, ...], x: Any) -> Any:
        known = sums.get(joined(at))
        return x if known is None else jax.ShapeDtypeStruct(x.shape, checksums.dtype_of(known), sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, trees)


def _cast(found: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Arrays in the types of others; each one given is let go as soon as it is cast."""
    leaves, structure = jax.tree.flatten(found)
    found.clear()
    for i, wanted in enumerate(jax.tree.leaves(like)):
        leaves[i] = leaves[i].astype(wanted.dtype)
    return jax.tree.unflatten(structure, leaves)


def _arrays(names: Sequence[str]) -> str:
    """Damaged arrays as a phrase."""
    plural = len(names) > 1
    return f"array{'s' * plural} {_some(names)} {'are' if plural else 'is'} not what was saved"


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(error: BaseException) -> str:
    """The root cause of an error: the outermost message is about the library's internals."""
    if isinstance(error, DamagedError):
        return str(error)
    while cause := error.__cause__ or error.__context__:
        error = cause
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:60]} ... {text[-95:]}"
