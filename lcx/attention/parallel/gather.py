"""All-gather attention: every device sees all keys, a slice of each shard at a time, so that memory stays bounded.

It has fewer and larger transfers than a ring, and none that has to be hidden: the choice if a device has few tokens.

Must be called inside `jax.shard_map`. Legend: B batch, S keys of one device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.blockwise import SAVED
from lcx.attention.partial import Partial, merge
from lcx.attention.shard import Keys, Local, Queries, backward, cotangents, forward, nothing_seen, over_slices, wide_zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather(local: Local, axis: str, slices: int, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider over the keys of all devices of mesh axis `axis`; `slices` divides S."""
    return _forward(local, axis, slices, queries, keys, bias_params)


def _forward(local: Local, axis: str, slices: int, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    wide = jnp.promote_types(queries.q.dtype, jnp.float32)

    def part(so_far: Partial, keys: Keys) -> tuple[Partial, None]:
        return merge(so_far, forward(local, queries, _everybodys(axis, keys), bias_params, wide)), None

    return over_slices(part, nothing_seen(queries), keys, slices)[0]


def _gather_forward(local: Local, axis: str, slices: int, queries: Queries, keys: Keys, bias_params: Any) -> tuple:
    whole = tuple(checkpoint_name(x, SAVED) for x in _forward(local, axis, slices, queries, keys, bias_params))
    return whole, (queries, keys, bias_params, whole)


def _gather_backward(local: Local, axis: str, slices: int, saved: tuple, cotangent: Partial) -> tuple:
    queries, keys, bias_params, whole = saved

    pull = backward(local, queries, keys.k.shape[2], bias_params, whole, cotangent)

    def part(state: tuple, keys: Keys) -> tuple[tuple, list]:
        (dq, *dkv, dbias), _ = pull.through(_everybodys(axis, keys), ())
        dkv = [jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in dkv]
        return jax.tree.map(jnp.add, state, (dq, dbias)), dkv

    (dq, dbias), dkv = over_slices(part, (pull.start, wide_zeros(bias_params)), keys, slices)
    return cotangents(queries, keys, bias_params, pull.finish(dq), dkv, dbias)


gather.defvjp(_gather_forward, _gather_backward)


def _everybodys(axis: str, keys: Keys) -> Keys:
    """The same part of the keys of all devices, gathered."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), keys)
