"""Ulysses: devices trade a share of the tokens for a share of the heads, and attend over whole rows (arXiv 2309.14509).

The tokens that are brought together are those of one piece of the ring (all tokens if there is no ring). JAX differentiates it:
every transfer is linear.

Must be called inside `jax.shard_map`. Legend: N heads, K KV heads, u devices of the axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.partial import Partial
from lcx.attention.shard import KVShard, QueryShard
from lcx.attention.spec import ShardSpec
from lcx.core.errors import UserError
from lcx.positions.scheme import BiasFn


def check_heads(num_heads: int, size: int) -> None:
    """Raises `UserError` naming the sizes that work if `num_heads` cannot be shared by `size` devices."""
    if num_heads % size:
        fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise UserError(f"mesh.ulysses={size} must divide the {num_heads} heads of a device; use one of {fits}")


def kv_copies(kv_heads: int, size: int) -> int:
    """How many copies of a KV head are sent so that every device gets those of its query heads: 1 if K is divisible by u."""
    return math.lcm(kv_heads, size) // kv_heads


@dataclasses.dataclass(frozen=True)
class HeadShare(BiasFn):
    """The bias of the heads that this device of mesh axis `axis` has after the exchange."""

    whole: BiasFn
    axis: str

    def __call__(self, bias_params: Any, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N / u, T, S]`."""
        return self._heads_here(self.whole(bias_params, q_positions, k_positions), 1)

    @property
    def linear(self) -> bool:
        """Whether the whole bias is linear."""
        return self.whole.linear

    def slopes(self, bias_params: Any) -> jax.Array:
        """float32 `[N / u]`."""
        return self._heads_here(self.whole.slopes(bias_params), 0)

    def _heads_here(self, x: jax.Array, axis: int) -> jax.Array:
        heads = x.shape[axis] // jax.lax.axis_size(self.axis)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * heads, heads, axis=axis)


def share_of_bias(shard: ShardSpec, axis: str) -> ShardSpec:
    """`shard` for the heads of this device of mesh axis `axis`; unchanged without a bias."""
    bias = shard.kernel.bias
    return (
        shard if bias is None else dataclasses.replace(shard, kernel=dataclasses.replace(shard.kernel, bias=HeadShare(bias, axis)))
    )


def ulysses(attention: Callable[[QueryShard, KVShard], Partial], axis: str, queries: QueryShard, keys: KVShard) -> Partial:
    """`attention` over the tokens of all devices of mesh axis `axis`, on this device's share of the heads."""
    size = jax.lax.axis_size(axis)
    copies = kv_copies(keys.k.shape[2], size)
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (keys.k, keys.v))

    def heads_for_tokens(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

    def tokens_for_heads(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)

    def everyone(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), tree)

    q_side = QueryShard(heads_for_tokens(queries.q), *everyone((queries.index, queries.tables)))
    k_side = KVShard(heads_for_tokens(k), heads_for_tokens(v), *everyone((keys.index, keys.tables)))
    o, lse = attention(q_side, k_side)
    return tokens_for_heads(o), tokens_for_heads(lse)
