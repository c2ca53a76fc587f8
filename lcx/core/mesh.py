"""The device mesh and the table that maps logical axes to physical ones.

A mesh always has the six axes of `AXES`, in that order; a single device is a mesh whose axes all have size 1. The sequence is
split over (ring, ulysses), whose product is called context in the config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lcx.core import host, processes
from lcx.core.chips import Chip, chip_of
from lcx.core.errors import UserError
from lcx.core.numbers import counted

AXES = ("data", "fsdp", "expert", "tensor", "ring", "ulysses")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("ring", "ulysses"),
    "embed": ("fsdp", "ring", "ulysses"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}
"""Logical axis of an array dimension -> mesh axes that split it. A name that is not in the table is never split."""

SEQUENCE = RULES["sequence"]
"""Mesh axes that split the sequence, the first one outermost."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1 (all remaining devices).

    `context` splits the sequence; `ulysses` is its share of the split, and `ring` is the rest. Of several TPU slices, which a slow
    network joins, only data and fsdp have their parts in different ones; with `context_over_slices` the ring may, too.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    context: int = 1
    ulysses: int = 1
    context_over_slices: bool = False

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis of `AXES` on `num_devices` devices; raises `UserError` when they do not fit."""
        given = {name: getattr(self, name) for name in ("data", "fsdp", "expert", "tensor", "context")}
        for name, size in (*given.items(), ("ulysses", self.ulysses)):
            if size < 1 and (size != -1 or name == "ulysses"):
                raise UserError(
                    f"mesh.{name}={size} must be positive" + ("" if name == "ulysses" else ", or -1 for all remaining devices")
                )
        open_axes = [name for name, size in given.items() if size == -1]
        if len(open_axes) > 1:
            raise UserError(f"mesh.{' and mesh.'.join(open_axes)} are both -1; leave only one to be inferred")
        fixed = math.prod(size for size in given.values() if size != -1)
        available = f"{num_devices} {'is' if num_devices == 1 else 'are'} available"
        if open_axes:
            if num_devices % fixed:
                raise UserError(
                    f"mesh axes {_text(given)} need a multiple of {fixed} devices and {available}; lower their product, or take "
                    f"{fixed} devices, on a CPU with --host_devices={fixed}, or in a local launch with --num_processes={fixed}"
                )
            given[open_axes[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise UserError(
                f"mesh axes {_text(given)} need {counted(fixed, 'device')} and {available}; set one axis to -1 to use "
                f"{'it' if num_devices == 1 else 'them all'}"
            )
        context = given.pop("context")
        if context % self.ulysses:
            raise UserError(
                f"mesh.context={context} must be divisible by mesh.ulysses={self.ulysses}; set mesh.context to a multiple of "
                f"{self.ulysses}"
            )
        return {**given, "ring": context // self.ulysses, "ulysses": self.ulysses}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes of `AXES`, each of automatic type."""
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes, types = config.sizes(len(devices)), (AxisType.Auto,) * len(AXES)
    if (slices := num_slices(devices)) == 1:
        return Mesh(arranged(sizes, devices), AXES, axis_types=types)
    outer = slices_spanned(sizes, slices, config.context_over_slices)
    inner = [sizes[name] // outer[name] for name in AXES]
    placed = mesh_utils.create_hybrid_device_mesh(inner, [outer[name] for name in AXES], devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=types)


def num_slices(devices: Sequence[Any]) -> int:
    """Number of TPU slices that the devices belong to; 1 for other devices."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def slices_spanned(sizes: Mapping[str, int], slices: int, with_context: bool = False) -> dict[str, int]:
    """Over how many slices each axis of `AXES` reaches: data first, then fsdp, and then, if asked for, the ring.

    Raises `UserError` if their sizes do not add up to all slices.
    """
    found: dict[str, int] = dict.fromkeys(AXES, 1)
    left = slices
    for axis in ("data", "fsdp", *("ring",) * with_context):
        found[axis] = math.gcd(sizes[axis], left)
        left //= found[axis]
    if left > 1:
        ways = "" if with_context else ", or set mesh.context_over_slices=True to let the sequence cross the slow network"
        raise UserError(
            f"{slices} TPU slices cannot share mesh.data={sizes['data']} x mesh.fsdp={sizes['fsdp']}; make their product a "
            f"multiple of {slices}, each slice taking whole parts{ways}"
        )
    return found


def arranged(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """`devices` as an array with the axes of `AXES`, neighbours along an axis near each other on a TPU's torus.

    An axis may take part of a dimension of the torus, as 8 devices do of 4 x 4 x 4.
    """
    shape = [sizes[name] for name in AXES]
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=list(devices)).devices
    except NotImplementedError:
        return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Physical spec of an array with these logical axes; raises `ValueError` when two dimensions claim the same mesh axis."""
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for name in logical_axes:
        physical = RULES.get(name, ()) if name is not None else ()
        for axis in physical:
            if axis in taken:
                raise ValueError(
                    f"logical axes {taken[axis]!r} and {name!r} both claim mesh axis {axis!r} in {tuple(logical_axes)}"
                )
            taken[axis] = str(name)
        entries.append(physical or None)
    return PartitionSpec(*entries)


def fitting_spec(logical_axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Physical spec of an array of this shape; a dimension that the mesh cannot split evenly stays whole."""
    fits = (name is None or size % axis_size(mesh, name) == 0 for name, size in zip(logical_axes, shape, strict=True))
    return partition_spec([name if fit else None for name, fit in zip(logical_axes, fits, strict=True)])


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of an array with these logical axes on `mesh`."""
    return NamedSharding(mesh, partition_spec(logical_axes))


def axis_size(mesh: Mesh | AbstractMesh, logical: str) -> int:
    """Number of pieces into which `mesh` splits a dimension of this logical name."""
    return math.prod(mesh.shape[axis] for axis in RULES.get(logical, ()))


def context_size() -> int:
    """Number of devices that share a sequence on the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else axis_size(mesh, "sequence")


def mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """Context manager that sets the multi-device mesh on which the tree's arrays are placed, unless a mesh is already set."""
    placed = (x.sharding for x in jax.tree.leaves(tree) if isinstance(getattr(x, "sharding", None), NamedSharding))
    mesh = next((sharding.mesh for sharding in placed), None)
    if mesh is None or mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty:
        return nullcontext()
    return jax.set_mesh(mesh)


def psum_scatter(x: jax.Array, axes: str | tuple[str, ...], dimension: int = 0, groups: list[list[int]] | None = None) -> jax.Array:
    """As `jax.lax.psum_scatter`, tiled, inside `jax.shard_map`; with `groups` of the axis' indices, each of consecutive ones, over
    the devices of each group.

    On the CPUs of several processes every device takes its part of the whole sum: the library that scatters there may give wrong
    numbers or fail (jax-ml/jax#40830).
    """
    if target_platform() != "cpu" or processes.count() == 1:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True, axis_index_groups=groups)
    devices = jax.lax.axis_size(axes) if groups is None else len(groups[0])
    size = x.shape[dimension] // devices
    place = jax.lax.axis_index(axes) % devices
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x, axes, axis_index_groups=groups), place * size, size, dimension)


def check_divides(what: str, size: int, mesh: Mesh, logical: str) -> None:
    """Raises `UserError` naming the nearest sizes when `mesh` cannot split a dimension of `size` evenly."""
    pieces = axis_size(mesh, logical)
    if size % pieces:
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[logical] if mesh.shape[axis] > 1)
        smaller = ", ".join(str(n) for n in range(1, pieces) if size % n == 0)
        raise UserError(
            f"{what}={size} must be divisible by {pieces} (mesh axes {axes}); try "
            f"{multiples(size, pieces)}, or split it {smaller} ways instead"
        )


def multiples(size: int, unit: int) -> str:
    """The multiples of `unit` nearest to `size`, for an error that suggests them."""
    below = size // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def target_platform() -> str:
    """The platform, "cpu", "gpu" or "tpu", for which the program being traced will run.

    That of the current mesh, whose devices may be absent when compiling ahead of time; without a mesh, that of this process.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_chip() -> Chip:
    """The chip for which the program being traced will run."""
    return chip_of(jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0])


def compute_capability() -> str | None:
    """Compute capability of this process's first device: "8.0" for an A100, a name such as "gfx942" for AMD, or None."""
    return getattr(jax.local_devices()[0], "compute_capability", None)


def fast_dtype(platform: str | None = None, capability: str | None = None, *, one_by_one: bool = False) -> str:
    """The type of number to compute in where nobody names one: bfloat16 where it is several times as fast, else float32.

    That is on a TPU, on a GPU whose compute `capability` (`compute_capability`) is at least 8.0, as older ones have no bfloat16
    products, and on a CPU with units for them (`host.multiplies_bfloat16`) unless tokens come `one_by_one`: decoding
    in bfloat16 is slower there. Without a `platform` it is that of this process's devices.
    """
    if platform is None:
        platform, capability = jax.default_backend(), compute_capability()
    if platform == "cpu":
        return "bfloat16" if host.multiplies_bfloat16() and not one_by_one else "float32"
    old = platform == "gpu" and capability is not None and capability[0].isdigit() and float(capability) < 8.0
    return "float32" if old else "bfloat16"


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
