"""Ulysses: devices trade a share of the tokens for a share of the heads, and attend over whole rows (arXiv 2309.14509).

The tokens that are brought together are those of one piece of the ring (all tokens if there is no ring). An axis of one device
exchanges nothing.

Must be called inside `jax.shard_map`. Legend: N heads, K KV heads, u devices of the axis.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.partial import to_fp32
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


def heads_for_tokens(axis: str, x: jax.Array) -> jax.Array:
    """`[B, T, N, ...]` of this device's tokens to `[B, u·T, N / u, ...]` of its heads."""
    return x if jax.lax.axis_size(axis) == 1 else jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


def tokens_for_heads(axis: str, x: jax.Array) -> jax.Array:
    """`[B, u·T, N / u, ...]` of this device's heads to `[B, T, N, ...]` of its tokens: the inverse, and the transpose."""
    return x if jax.lax.axis_size(axis) == 1 else jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)


def keys_for_tokens(axis: str, x: jax.Array) -> jax.Array:
    """`heads_for_tokens` of keys or values `[B, T, K, H]`, whose heads are sent to as many devices as have queries for them."""
    copies = kv_copies(x.shape[2], jax.lax.axis_size(axis))
    return heads_for_tokens(axis, jnp.repeat(x, copies, axis=2) if copies > 1 else x)


def tokens_for_keys(axis: str, dx: jax.Array, like: jax.Array) -> jax.Array:
    """The transpose of `keys_for_tokens`: gradients sent back in the dtype of `like` `[B, T, K, H]`, copies summed in float32."""
    home = tokens_for_heads(axis, dx.astype(like.dtype))
    if home.shape == like.shape:
        return home
    copies = home.reshape(*like.shape[:3], -1, like.shape[3])
    return jnp.sum(to_fp32(copies), axis=3).astype(like.dtype)


def of_all_tokens(axis: str, tree: Any) -> Any:
    """Arrays `[B, T, ...]` of every device's tokens, `[B, u·T, ...]`."""
    return tree if jax.lax.axis_size(axis) == 1 else jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), tree)
