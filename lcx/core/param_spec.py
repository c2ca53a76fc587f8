"""One table of specs that yields a model's abstract tree, its shardings and its initial values."""

from __future__ import annotations

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp

from lcx.core.mesh import named_sharding
from lcx.core.trees import Tree, paths


@dataclasses.dataclass(frozen=True)
class Init:
    """How a parameter is initialised.

    `kind` is `normal` (standard deviation `value`), `truncated` (the same, cut at two deviations), `uniform` (from -`value` to
    `value`), `constant`, or `diagonal` (`value` where the first two indices are equal, zero elsewhere).
    """

    kind: str = "truncated"
    value: float = 0.02


ZEROS = Init("constant", 0.0)
ONES = Init("constant", 1.0)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, one logical axis name per dimension (None: never sharded), and initialisation of one parameter.

    A weight matrix is `[*stacked, *inputs, *outputs]`: `stacked` axes (layers, experts) hold one matrix each, the next `inputs`
    axes are those that its product sums over. `inputs` is 0 for everything that is not applied as a matrix.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    init: Init = Init()
    inputs: int = 0
    stacked: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(f"shape {self.shape} needs {len(self.shape)} logical axes, got {self.logical_axes}")


def is_spec(leaf: object) -> bool:
    """True for the leaves of a spec table."""
    return isinstance(leaf, ParamSpec)


def abstract(specs: Tree, mesh: jax.sharding.Mesh | None = None, dtype: jnp.dtype = jnp.float32) -> Tree:
    """`ShapeDtypeStruct`s for the table, with shardings when a mesh is given."""

    def one(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, spec.logical_axes)
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def shardings(specs: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """`NamedSharding`s for the table."""
    return jax.tree.map(lambda spec: named_sharding(mesh, spec.logical_axes), specs, is_leaf=is_spec)


def initialize(specs: Tree, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Tree:
    """Initial values; each leaf's depend only on `key` and its path, so adding a parameter changes no other."""
    flat = dict(paths_of(specs))
    values = {path: _draw(spec, jax.random.fold_in(key, zlib.crc32(path.encode())), dtype) for path, spec in flat.items()}
    treedef = jax.tree.structure(specs, is_leaf=is_spec)
    return jax.tree.unflatten(treedef, [values[path] for path in flat])


def paths_of(specs: Tree) -> list[tuple[str, ParamSpec]]:
    """The table's specs with their `/`-joined paths."""
    return list(paths(specs))


def _draw(spec: ParamSpec, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    match spec.init.kind:
        case "constant":
            return jnp.full(spec.shape, spec.init.value, dtype)
        case "diagonal":
            matrix = spec.init.value * jnp.eye(*spec.shape[:2], dtype=dtype)
            return jnp.broadcast_to(matrix.reshape(matrix.shape + (1,) * len(spec.shape[2:])), spec.shape)
        case "normal":
            return (spec.init.value * jax.random.normal(key, spec.shape)).astype(dtype)
        case "uniform":
            return jax.random.uniform(key, spec.shape, dtype, -spec.init.value, spec.init.value)
        case "truncated":
            # A normal cut at two deviations has deviation 0.8796; divide it out so that `value` is the actual deviation.
            return (spec.init.value / 0.87962566 * jax.random.truncated_normal(key, -2, 2, spec.shape)).astype(dtype)
        case kind:
            raise ValueError(f"unknown init kind {kind!r}")


def fan_in(*dims: int) -> Init:
    """Truncated normal with deviation 1/sqrt(product of the input dimensions)."""
    return Init("truncated", 1 / math.sqrt(math.prod(dims)))
