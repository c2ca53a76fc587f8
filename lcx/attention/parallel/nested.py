"""Attention over documents that are dealt to devices (`dealing`): keys go where they are needed, in rings nested in the whole one.

The keys of a document that lies on one device stay there. The others are gathered from all devices of their ring, part by part,
while every device works on the part before. How many parts that is depends on the documents, and is counted when the program runs:
it is the same program for all batches. A key is visited once: wherever it is not due, it is marked as padding.

Must be called inside `jax.shard_map`. Legend: B batch, T tokens of a row, S keys of one device, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.parallel.dealing import nested_rings, part_sizes
from lcx.attention.partial import Partial, merge, zeros_fp32
from lcx.attention.shard import Gradients, KVShard, QueryShard, nothing_seen, shard_attention, shard_vjp
from lcx.attention.spec import ShardSpec
from lcx.core.batch import PADDING
from lcx.core.mesh import psum_scatter

Parts = tuple[jax.Array, ...]
"""Of how many parts of every device the keys go around each of `nested_rings`: int32 scalars, the same on all devices."""


def parts_of(reach: jax.Array, n: int) -> Parts:
    """The parts for a batch, from the ring in which each of its tokens is needed, int32 `[B, T]` of a global array (`Index.reach`).

    As `dealing.parts_needed`, for the row and the device that need most.
    """
    tokens = reach.shape[1] // n
    place, found = jax.lax.broadcasted_iota(jnp.int32, reach.shape, 1) % tokens, []
    for size, part in zip(nested_rings(n), part_sizes(tokens, n), strict=True):
        ends = place + 1 if size == n else part * size - place
        found.append(jnp.max(jnp.where(reach == size, (ends + part - 1) // part, 0)))
    return tuple(found)


def nested(shard: ShardSpec, axis: str, parts: Parts, queries: QueryShard, keys: KVShard, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider of the queries here over all keys of mesh axis `axis` that they see."""
    held = _Held(axis, keys)

    def visit(so_far: Partial, here: KVShard, following: Any) -> tuple[Partial, Any]:
        part = shard_attention(shard, queries, here, bias_params)
        # As in a ring: the transfer is not to be moved behind the kernel.
        following, part = jax.lax.optimization_barrier((following, part))
        return merge(so_far, part), following

    state = (nothing_seen(queries), held.due(1))
    for size, count in zip(held.rings, parts, strict=True):

        def hop(i: jax.Array, state: tuple, size: int = size) -> tuple:
            return visit(state[0], state[1], held.gathered(size, i))

        state = jax.lax.fori_loop(0, count, hop, state)
    return visit(state[0], state[1], ())[0]


def nested_backward(
    shard: ShardSpec,
    axis: str,
    parts: Parts,
    queries: QueryShard,
    keys: KVShard,
    bias_params: Any,
    whole: Partial,
    cotangent: Partial,
) -> Gradients:
    """The gradients of `nested`, from its result `whole` and the cotangent of that."""
    held, wide = _Held(axis, keys), whole[1].dtype
    pull = shard_vjp(shard, queries, keys.k.shape[2], bias_params, whole, cotangent)

    def visit(sums: tuple, here: KVShard, in_flight: Any) -> tuple[tuple, jax.Array, Any]:
        (dq, dk, dv, dbias), in_flight = pull.step(here, in_flight)
        return jax.tree.map(jnp.add, sums, (dq, dbias)), jnp.stack((dk, dv)).astype(wide), in_flight

    def walk(size: int, count: jax.Array, state: tuple) -> tuple:
        """All parts of a ring: one is visited while the next comes, and while the gradients of the one before go home."""

        def hop(i: jax.Array, carry: tuple) -> tuple:
            sums, dkv, here, pending = carry
            in_flight = held.gathered(size, i), held.scattered(size, pending)
            sums, pending, (following, home) = visit(sums, here, in_flight)
            return sums, held.add(size, i - 2, dkv, home), following, pending

        sums, dkv = state
        carry = sums, dkv, held.gathered(size, jnp.int32(0)), jnp.zeros_like(dkv)
        sums, dkv, here, pending = jax.lax.fori_loop(1, count, hop, carry)
        sums, last, (home,) = visit(sums, here, (held.scattered(size, pending),))
        dkv = held.add(size, count - 2, dkv, home)
        return sums, held.add(size, count - 1, dkv, held.scattered(size, last))

    sums, dkv, _ = visit((pull.init, zeros_fp32(bias_params)), held.due(1), ())
    for size, count in zip(held.rings, parts, strict=True):
        # Whether anything goes around a ring is the same on all devices.
        sums, dkv = jax.lax.cond(count > 0, functools.partial(walk, size, count), lambda state: state, (sums, dkv))
    (dq, dbias), (dk, dv) = sums, dkv[:, :, : keys.k.shape[1]]
    return Gradients(pull.finalize(dq), dk, dv, dbias)


class _Held:
    """The keys of this device, filled up with padding to a multiple of the devices, and their exchange with other devices."""

    def __init__(self, axis: str, keys: KVShard) -> None:
        self.axis, self.n, size = axis, jax.lax.axis_size(axis), keys.k.shape[1]
        self.rings, self.parts = nested_rings(self.n), dict(zip(nested_rings(self.n), part_sizes(size, self.n), strict=True))
        self.size = -(-size // self.n) * self.n

        def fill(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, self.size - size)] + [(0, 0)] * (x.ndim - 2)) if self.size > size else x

        self.keys = jax.tree.map(fill, keys)

    def due(self, ring: int) -> KVShard:
        """The keys with those that are not needed in a ring of this size marked as padding."""
        index = self.keys.index
        segments = jnp.where(index.reach == ring, index.segments, PADDING)
        return dataclasses.replace(self.keys, index=dataclasses.replace(index, segments=segments, reach=None))

    def gathered(self, ring: int, i: jax.Array) -> KVShard:
        """Part i of the keys of all devices of a ring that are due in it, as many as this device holds."""

        def one(x: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(x, self._start(ring, i), self.parts[ring], axis=1)
            return jax.lax.all_gather(part, self.axis, axis=1, tiled=True, axis_index_groups=self._groups(ring))

        return jax.tree.map(one, self.due(ring))

    def scattered(self, ring: int, dkv: jax.Array) -> jax.Array:
        """Gradients `[2, B, S, K, H]` of a gathered part, summed over the devices of the ring: those of this device's own part."""
        return psum_scatter(dkv, self.axis, 2, self._groups(ring))

    def add(self, ring: int, i: jax.Array, dkv: jax.Array, part: jax.Array) -> jax.Array:
        """`dkv` with the gradients of part i added; before the first part there are none, and zeros are added anywhere."""
        start = self._start(ring, jnp.maximum(i, 0))
        old = jax.lax.dynamic_slice_in_dim(dkv, start, self.parts[ring], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(dkv, old + part, start, axis=2)

    def _start(self, ring: int, i: jax.Array) -> jax.Array:
        return i * self.parts[ring] if ring == self.n else self.size - (i + 1) * self.parts[ring]

    def _groups(self, ring: int) -> list[list[int]] | None:
        return None if ring == self.n else [list(range(first, first + ring)) for first in range(0, self.n, ring)]
