"""Checksums (XXH3, 64 bits) of arrays: one of each shard, taken by the process that holds it, and compared on any other mesh.

A shard is known by the box that it is of the whole array, as `0:128,0:64`. An array that lies otherwise when it is compared is cut
into the boxes of then, where one process holds it all; where none does, what could not be compared is said.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from lcx.core.trees import Tree, paths

_THREADED = 1 << 24
"""Bytes from which on threads are worth their start."""


@dataclasses.dataclass(frozen=True)
class ArraySums:
    """Type and shape of an array, and the checksum of each box of it."""

    dtype: str
    shape: tuple[int, ...]
    boxes: dict[str, str]

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The type as JAX has it."""
        return jnp.dtype(self.dtype)

    def joined(self, other: ArraySums) -> ArraySums:
        """With the boxes of another process."""
        return dataclasses.replace(self, boxes={**self.boxes, **other.boxes})


@dataclasses.dataclass(frozen=True)
class Compared:
    """Paths of arrays that are `unlike` what was saved, and of those that no process holds in the boxes that were saved."""

    unlike: list[str]
    open: list[str]


def own_sums(tree: Tree) -> dict[str, ArraySums]:
    """Path -> checksums of the shards of each leaf that this process answers for: of each box the first of its copies.

    Leaves are arrays of any sharding; they are read before this returns.
    """
    found = {path: ArraySums(np.dtype(x.dtype).name, tuple(x.shape), {}) for path, x in paths(tree)}
    pieces = [(path, box, data) for path, x in paths(tree) for box, data in _own_boxes(x)]
    for (path, box, _), digest in zip(pieces, _hashes([data for _, _, data in pieces]), strict=True):
        found[path].boxes[box] = digest
    return found


def compare(tree: Tree, sums: Mapping[str, ArraySums]) -> Compared:
    """The arrays of a tree against what `own_sums` gave, of all processes together. Leaves without any are unlike.

    With several processes each compares what it holds, and has to be told what the others have found.
    """
    unlike, unknown, pieces = set(), [], []
    for path, x in paths(tree):
        saved = sums.get(path)
        if saved is None or tuple(x.shape) != saved.shape or np.dtype(x.dtype).name != saved.dtype:
            unlike.add(path)
            continue
        if isinstance(x, np.ndarray) or x.is_fully_addressable:
            pieces += [(path, wanted, data) for wanted, data in _cut(x, saved.boxes)]
            continue
        if not saved.boxes.keys() <= {_box(index, x.shape) for index in x.sharding.devices_indices_map(x.shape).values()}:
            unknown.append(path)
            continue
        pieces += [(path, saved.boxes[box], data) for box, data in _own_boxes(x) if box in saved.boxes]
    for (path, wanted, _), digest in zip(pieces, _hashes([data for _, _, data in pieces]), strict=True):
        if digest != wanted:
            unlike.add(path)
    return Compared(sorted(unlike), unknown)


def _own_boxes(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, np.ndarray):
        yield _box((slice(None),) * x.ndim, x.shape), x
        return
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            yield _box(shard.index, x.shape), shard.data


def _cut(x: Any, boxes: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """(checksum that was saved, numbers of the box), for an array that this process holds."""
    held = {} if isinstance(x, np.ndarray) else {_box(shard.index, x.shape): shard.data for shard in x.addressable_shards}
    whole = None
    for box, wanted in boxes.items():
        if box in held:
            yield wanted, held[box]
            continue
        whole = np.asarray(x) if whole is None else whole
        yield wanted, whole[_slices(box)]


def is_like(stored: Any, saved: ArraySums) -> bool:
    """Whether an array of tensorstore's is what was saved; it is read box by box."""
    if tuple(stored.shape) != saved.shape or stored.dtype.numpy_dtype != saved.jax_dtype:
        return False
    return all(_hash(stored[_slices(box)].read().result()) == wanted for box, wanted in saved.boxes.items())


def _slices(box: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in box.split(",") if part)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    return ",".join("{}:{}".format(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _hashes(arrays: list[Any]) -> list[str]:
    if sum(x.nbytes for x in arrays) < _THREADED:
        return [_hash(x) for x in arrays]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as executor:
        return list(executor.map(_hash, arrays))


def _hash(x: Any) -> str:
    if isinstance(x, jax.Array) and next(iter(x.devices())).platform != "cpu":
        # A copy that is gone afterwards: numpy's own of an array on a device stays as long as the array.
        x = jax.device_put(x, jax.local_devices(backend="cpu")[0])
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
