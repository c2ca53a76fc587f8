"""All-gather attention: every device sees all keys, a slice of each shard at a time, so that memory stays bounded.

Fewer and larger transfers than a ring, and none that has to hide: the choice where a device has few tokens.

To be called inside `jax.shard_map`. Legend: B batch, S keys of one device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.blockwise import SAVED
from lcx.attention.local import Keys, Local, Queries, backward, forward
from lcx.attention.merge import Partial, merge


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather(local: Local, axis: str, slices: int, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider over the keys of all devices of mesh axis `axis`; `slices` divides S."""
    return _forward(local, axis, slices, queries, keys, bias_params)


def _forward(local: Local, axis: str, slices: int, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    wide = jnp.promote_types(queries.q.dtype, jnp.float32)
    B, T, N, _ = queries.q.shape

    def one(so_far: Partial, i: jax.Array) -> tuple[Partial, None]:
        return merge(so_far, forward(local, queries, _slice(axis, slices, keys, i), bias_params, wide)), None

    start = (jnp.zeros(queries.q.shape, wide), jnp.full((B, T, N), -jnp.inf, wide))
    return jax.lax.scan(one, start, jnp.arange(slices))[0]


def _gather_forward(local: Local, axis: str, slices: int, queries: Queries, keys: Keys, bias_params: Any) -> tuple:
    whole = tuple(checkpoint_name(x, SAVED) for x in _forward(local, axis, slices, queries, keys, bias_params))
    return whole, (queries, keys, bias_params, whole)


def _gather_backward(local: Local, axis: str, slices: int, saved: tuple, cotangent: Partial) -> tuple:
    queries, keys, bias_params, whole = saved

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)

    def one(state: tuple, i: jax.Array) -> tuple:
        here = _slice(axis, slices, keys, i)
        dq, *dkv, dbias = backward(local, queries, here, bias_params, whole, cotangent)
        dkv = [jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in dkv]
        return jax.tree.map(jnp.add, state, (dq, dbias)), dkv

    (dq, dbias), dkv = jax.lax.scan(one, (zeros(queries.q), zeros(bias_params)), jnp.arange(slices))
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(like.shape).astype(like.dtype) for x, like in zip(dkv, (keys.k, keys.v), strict=True))
    nothing = functools.partial(jax.tree.map, jnp.zeros_like)
    return (
        Queries(dq.astype(queries.q.dtype), None, nothing(queries.tables)),
        Keys(dk, dv, None, nothing(keys.tables)),
        jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias_params),
    )


gather.defvjp(_gather_forward, _gather_backward)


def _slice(axis: str, slices: int, keys: Keys, i: jax.Array) -> Keys:
    """Slice i of every device's keys."""

    def one(x: jax.Array) -> jax.Array:
        size = x.shape[1] // slices
        return jax.lax.all_gather(jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1), axis, axis=1, tiled=True)

    return jax.tree.map(one, keys)
