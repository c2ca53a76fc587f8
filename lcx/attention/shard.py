"""Attention between the queries and keys that a device holds: rotation, regions and kernel, forward and backward.

Strategies move `KVShard` between devices and call these two functions on what has arrived. The backward pass takes o and lse over
*all* keys, so that the gradients of a part are right wherever the rest of the keys was.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from lcx.attention.blockwise import blockwise, blockwise_vjp
from lcx.attention.dense import dense, dense_vjp
from lcx.attention.flat import flat
from lcx.attention.pallas.flash import flash, flash_vjp
from lcx.attention.partial import AttentionVjp, Partial, merge, to_fp32
from lcx.attention.spec import KernelSpec, ShardSpec
from lcx.core.batch import Index
from lcx.positions.rotary import Tables, rotate_by
from lcx.positions.scheme import Region


class KernelPair(NamedTuple):
    """A kernel: forward `(spec, q, k, v, q_index, k_index, bias_params)` and its pull-back `(spec, q, q_index, kv_heads,
    bias_params, whole, cotangent)`. A `tiled` one reads `KernelSpec.blocks`.
    One that is not `partitionable` is opaque to the compiler, which cannot split it over rows and heads by itself."""

    forward: Callable[..., Any]
    vjp: Callable[..., AttentionVjp]
    tiled: bool = False
    partitionable: bool = True


KERNELS: dict[str, KernelPair] = {
    "dense": KernelPair(dense, dense_vjp),
    "flat": KernelPair(flat, dense_vjp),
    "blockwise": KernelPair(blockwise, blockwise_vjp, tiled=True),
    "flash": KernelPair(flash, flash_vjp, tiled=True, partitionable=False),
}


@flax.struct.dataclass
class QueryShard:
    """Unrotated queries `[B, T, N, H]`, their index, and the rotary tables of their positions."""

    q: jax.Array
    index: Index
    tables: Tables


@flax.struct.dataclass
class KVShard:
    """Unrotated keys and values `[B, S, K, H]`, their index, and the rotary tables of their positions: what devices send around."""

    k: jax.Array
    v: jax.Array
    index: Index
    tables: Tables


def shard_attention(shard: ShardSpec, queries: QueryShard, keys: KVShard, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` of the queries over these keys, all regions merged; differentiable by JAX."""
    forward, parts = KERNELS[shard.kernel.kernel].forward, []
    for region in shard.regions:
        q = rotate_by(queries.q, region.q_rotation, queries.tables, shard.layout)
        k = rotate_by(keys.k, region.k_rotation, keys.tables, shard.layout)
        parts.append(forward(_spec_of(shard, region), q, k, keys.v, queries.index, keys.index, bias_params))
    return functools.reduce(merge, parts)


class ShardVjp(NamedTuple):
    """The gradients of a device's queries through any keys: like `AttentionVjp`, but for `KVShard` and with all regions merged.

    `step(keys, in_flight)` returns `((dq, dk, dv, dbias_params), in_flight)`.
    """

    init: tuple[jax.Array, ...]
    step: Callable[[KVShard, Any], tuple[tuple[Any, ...], Any]]
    finalize: Callable[[tuple[jax.Array, ...]], jax.Array]


def shard_vjp(
    shard: ShardSpec, queries: QueryShard, kv_heads: int, bias_params: Any, whole: Partial, cotangent: Partial
) -> ShardVjp:
    """The pull-back to any keys.

    `whole` is (o, lse) of the queries over all their keys, wherever those are, and `cotangent` its cotangent. Work on the queries
    is done once, before and after, however many keys pass by.
    """
    pulls = []
    for region in shard.regions:
        q, turn_back = jax.vjp(
            lambda x, name=region.q_rotation: rotate_by(x, name, queries.tables, shard.layout), to_fp32(queries.q)
        )
        given = (q.astype(queries.q.dtype), queries.index, kv_heads, bias_params, whole, cotangent)
        pulls.append((region, turn_back, KERNELS[shard.kernel.kernel].vjp(_spec_of(shard, region), *given)))

    def step(keys: KVShard, in_flight: Any) -> tuple[tuple[Any, ...], Any]:
        dq: list[Any] = []
        total: Any = None
        for region, _, pull in pulls:
            k, turn_back = jax.vjp(lambda x, name=region.k_rotation: rotate_by(x, name, keys.tables, shard.layout), to_fp32(keys.k))
            last = region is shard.regions[-1]
            (dq_part, dk, dv, dbias), moved = pull.step(k.astype(keys.k.dtype), keys.v, keys.index, in_flight if last else ())
            dq.append(dq_part)
            part = (*turn_back(dk), dv, dbias)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return (tuple(dq), *total), moved

    def finalize(dq: tuple[jax.Array, ...]) -> jax.Array:
        total: Any = sum(turn_back(pull.finalize(x))[0] for x, (_, turn_back, pull) in zip(dq, pulls, strict=True))
        return total

    return ShardVjp(tuple(pull.init for *_, pull in pulls), step, finalize)


def nothing_seen(queries: QueryShard) -> Partial:
    """The result of queries that have not seen any key yet: the start for merging partial results."""
    wide = jnp.promote_types(queries.q.dtype, jnp.float32)
    return jnp.zeros(queries.q.shape, wide), jnp.full(queries.q.shape[:3], -jnp.inf, wide)


class Gradients(NamedTuple):
    """What a strategy's backward pass finds, in float32 or wider: of q, of k and v where they came from, and of the bias."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: Any


def scan_key_slices(part: Callable, state: Any, keys: KVShard, slices: int) -> tuple[Any, Any]:
    """`part(state, keys) -> (state, out)` over `slices` parts of the keys in turn; each `out` `[B, S / slices, ...]` is joined."""
    if slices == 1:
        return part(state, keys)

    def one(state: Any, i: jax.Array) -> tuple[Any, Any]:
        def part_of(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * (x.shape[1] // slices), x.shape[1] // slices, axis=1)

        return part(state, jax.tree.map(part_of, keys))

    state, out = jax.lax.scan(one, state, jnp.arange(slices))
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), out)


def map_head_groups(
    part: Callable, groups: int, sums: Any, out: tuple[jax.Array, ...], arrays: tuple[jax.Array, ...], blocks: int = 1
) -> Any:
    """`part(sums, *arrays) -> (sums, found)` for `groups` groups of the heads in turn, `found` written into `out`.

    Heads are axis 2 of `out` and `arrays`. A group has its share of each of `blocks` equal parts of the heads. Returns (sums, out).
    """
    if groups == 1:
        return part(sums, *arrays)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], blocks, groups, x.shape[2] // blocks // groups, *x.shape[3:])

    def one(i: jax.Array, carry: tuple) -> tuple:
        sums, out = carry
        chosen = (jax.lax.dynamic_index_in_dim(cut(x), i, 3, keepdims=False) for x in arrays)
        sums, found = part(sums, *(x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in chosen))
        pairs = ((cut(whole), x) for whole, x in zip(out, found, strict=True))
        placed = (jax.lax.dynamic_update_index_in_dim(w, x.reshape(*w.shape[:3], *w.shape[4:]), i, 3) for w, x in pairs)
        return sums, tuple(w.reshape(*w.shape[:2], -1, *w.shape[5:]) for w in placed)

    return jax.lax.fori_loop(0, groups, one, (sums, out))


def _spec_of(shard: ShardSpec, region: Region) -> KernelSpec:
    return dataclasses.replace(shard.kernel, mask=dataclasses.replace(shard.kernel.mask, band=region.band))
