"""All-gather attention: every device sees all keys, a slice of each shard at a time, so that memory stays bounded.

It has fewer and larger transfers than a ring, and none that has to be hidden: the choice if a device has few tokens.

Must be called inside `jax.shard_map`. Legend: B batch, S keys of one device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.partial import Partial, merge, zeros_fp32
from lcx.attention.shard import Gradients, KVShard, QueryShard, nothing_seen, scan_key_slices, shard_attention, shard_vjp
from lcx.attention.spec import ShardSpec
from lcx.core.mesh import psum_scatter


def gather(shard: ShardSpec, axis: str, slices: int, queries: QueryShard, keys: KVShard, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider over the keys of all devices of mesh axis `axis`; `slices` divides S."""

    def part(so_far: Partial, keys: KVShard) -> tuple[Partial, None]:
        return merge(so_far, shard_attention(shard, queries, _everybodys(axis, keys), bias_params)), None

    return scan_key_slices(part, nothing_seen(queries), keys, slices)[0]


def gather_backward(
    shard: ShardSpec,
    axis: str,
    slices: int,
    queries: QueryShard,
    keys: KVShard,
    bias_params: Any,
    whole: Partial,
    cotangent: Partial,
) -> Gradients:
    """The gradients of `gather`, from its result `whole` and the cotangent of that."""
    pull = shard_vjp(shard, queries, keys.k.shape[2], bias_params, whole, cotangent)

    def part(state: tuple, keys: KVShard) -> tuple[tuple, list]:
        (dq, *dkv, dbias), _ = pull.step(_everybodys(axis, keys), ())
        dkv = [psum_scatter(x, axis, 1) for x in dkv]
        return jax.tree.map(jnp.add, state, (dq, dbias)), dkv

    (dq, dbias), (dk, dv) = scan_key_slices(part, (pull.init, zeros_fp32(bias_params)), keys, slices)
    return Gradients(pull.finalize(dq), dk, dv, dbias)


def _everybodys(axis: str, keys: KVShard) -> KVShard:
    """The same part of the keys of all devices, gathered."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), keys)
