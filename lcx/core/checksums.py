"""Checksums of arrays that are the same on any mesh and any number of processes: a sum over elements, each mixed with its place.

An element's bits and its index in the whole array go through the finaliser of MurmurHash3 (public domain, A. Appleby), and the
results are added modulo 2**32. A sum does not ask who holds which part, so a device adds up its own shard, and XLA the shards. The
finaliser is a bijection: one changed element always changes the sum; any other damage goes unseen once in 2**32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.trees import Tree, paths

SMALL = 1 << 22
"""Bytes of an array up to which numpy is quicker than a compiled program of its shape would be."""

_PLACE, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_BLOCK = 1 << 15
"""Elements that numpy works on at a time, so that they stay in a core's cache."""


def tree_sums(tree: Tree) -> dict[str, str]:
    """Path of each leaf -> its type and checksum, as `float32 0badcafe`; leaves are arrays of any shape and sharding.

    Every process that holds a part of them has to call it, and all get the same.
    """
    leaves = dict(paths(tree))
    sums = jax.device_get({path: _sum(leaf) for path, leaf in leaves.items()})
    return {path: f"{np.dtype(leaf.dtype).name} {int(sums[path]):08x}" for path, leaf in leaves.items()}


def differing(tree: Tree, sums: Mapping[str, str]) -> list[str]:
    """Paths of the leaves whose checksum is not the one in `sums`, or is not there."""
    return [path for path, found in tree_sums(tree).items() if sums.get(path) != found]


def dtype_of(checksum: str) -> np.dtype:
    """The type of the array that a checksum of `tree_sums` was made of."""
    return jnp.dtype(checksum.partition(" ")[0])


def _sum(x: Any) -> Any:
    if isinstance(x, np.ndarray) or x.is_fully_addressable and x.nbytes <= SMALL:
        return sum_on_host(np.asarray(x))
    return sum_on_devices(x)


def sum_on_host(x: np.ndarray) -> int:
    """The checksum of an array of any shape, by numpy."""
    bits = np.ascontiguousarray(x).reshape(-1).view(_unsigned(x.dtype))
    total = 0
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint32)
        places = np.arange(start, start + len(block), dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(block, places).sum(dtype=np.uint64))
    return total & 0xFFFFFFFF


@jax.jit
def sum_on_devices(x: jax.Array) -> jax.Array:
    """The checksum uint32 of an array of any shape and sharding, where it is."""
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)) if x.dtype != jnp.bool_ else x
    bits = bits.astype(jnp.uint32).reshape(bits.shape or (1,))
    places, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        places += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride & 0xFFFFFFFF)
        stride *= bits.shape[axis]
    # Row by row first, as a CPU's threads share rows.
    rows = jnp.sum(_mixed(bits, places), axis=tuple(range(1, bits.ndim)), dtype=jnp.uint32)
    return jnp.sum(rows, dtype=jnp.uint32)


def _mixed(bits: Any, places: Any) -> Any:
    """uint32 of the same shape, of numpy or JAX."""
    x = bits ^ (places * _PLACE)
    x = (x ^ (x >> np.uint32(16))) * _FIRST
    x = (x ^ (x >> np.uint32(13))) * _SECOND
    return x ^ (x >> np.uint32(16))


def _unsigned(dtype: Any) -> np.dtype:
    """The unsigned type of as many bits; raises `TypeError` for elements of more than 32."""
    size = np.dtype(dtype).itemsize
    if size not in (1, 2, 4):
        raise TypeError(f"checksums are of elements of at most 32 bits, not of {dtype}")
    return np.dtype(f"uint{8 * size}")
