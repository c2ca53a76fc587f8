"""Ring attention: keys and values walk from device to device while every device works on what it has (arXiv 2310.01889).

Keys travel raw, unrepeated and in their own dtype, with their index and rotary tables; results are merged in float32. The backward
pass walks the same way and carries the pending gradients of the travelling keys with it. Nothing depends on which tokens a device
holds, so any layout is right; what the mask rules out is skipped by the kernel, block by block.

To be called inside `jax.shard_map`. Legend: B batch, T tokens of one device, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.blockwise import SAVED
from lcx.attention.local import Keys, Local, Queries, backward, forward
from lcx.attention.merge import Partial, merge


@dataclasses.dataclass(frozen=True)
class Hops:
    """How many devices before and after its own a device hears from. A whole ring is (n - 1, 0)."""

    before: int
    after: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring(local: Local, axis: str, hops: Hops, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider of this device's queries over the keys of `hops` devices along mesh axis `axis`."""
    return _forward(local, axis, hops, queries, keys, bias_params)


def _forward(local: Local, axis: str, hops: Hops, queries: Queries, keys: Keys, bias_params: Any) -> Partial:
    wide = jnp.promote_types(queries.q.dtype, jnp.float32)

    def visit(so_far: Partial, here: Keys, following: Any) -> tuple[Partial, Any]:
        part = forward(local, queries, here, bias_params, wide)
        # Keeps the compiler from moving the transfer behind the kernel, where only the merge would be left to hide it.
        following, part = jax.lax.optimization_barrier((following, part))
        return merge(so_far, part), following

    B, T, N, _ = queries.q.shape
    result = (jnp.zeros(queries.q.shape, wide), jnp.full((B, T, N), -jnp.inf, wide))
    for shift, start, stop in _legs(hops):
        result = _walk(axis, shift, start, stop, keys, visit, result)[0]
    return result


def _ring_forward(local: Local, axis: str, hops: Hops, queries: Queries, keys: Keys, bias_params: Any) -> tuple:
    whole = tuple(checkpoint_name(x, SAVED) for x in _forward(local, axis, hops, queries, keys, bias_params))
    return whole, (queries, keys, bias_params, whole)


def _ring_backward(local: Local, axis: str, hops: Hops, saved: tuple, cotangent: Partial) -> tuple:
    queries, keys, bias_params, whole = saved
    wide = whole[0].dtype

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)

    dq, dbias, dkv = zeros(queries.q), zeros(bias_params), None
    for shift, start, stop in _legs(hops):

        def visit(state: tuple, here: Keys, following: Any, shift: int = shift) -> tuple[tuple, Any]:
            dq, dbias, pending = state
            arrived = _send(axis, shift, pending)
            dq_part, *dkv_part, dbias_part = backward(local, queries, here, bias_params, whole, cotangent)
            following, arrived, dkv_part = jax.lax.optimization_barrier((following, arrived, tuple(dkv_part)))
            dkv = jax.tree.map(lambda a, b: a + b.astype(wide), arrived, dkv_part)
            return (dq + dq_part, jax.tree.map(jnp.add, dbias, dbias_part), dkv), following

        state = (dq, dbias, zeros((keys.k, keys.v)))
        (dq, dbias, pending), _ = _walk(axis, shift, start, stop, keys, visit, state)
        # The last keys that were visited are `stop` devices from home.
        home = _send(axis, -shift * stop, pending) if stop else pending
        dkv = home if dkv is None else jax.tree.map(jnp.add, dkv, home)
    dk, dv = (x.astype(like.dtype) for x, like in zip(dkv, (keys.k, keys.v), strict=True))
    nothing = functools.partial(jax.tree.map, jnp.zeros_like)
    return (
        Queries(dq.astype(queries.q.dtype), None, nothing(queries.tables)),
        Keys(dk, dv, None, nothing(keys.tables)),
        jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias_params),
    )


ring.defvjp(_ring_forward, _ring_backward)


def _legs(hops: Hops) -> list[tuple[int, int, int]]:
    """(direction in which keys move, first and last distance that is visited)."""
    return [(1, 0, hops.before)] + ([(-1, 1, hops.after)] if hops.after else [])


def _send(axis: str, shift: int, tree: Any) -> Any:
    """Every device's arrays to the device `shift` places on."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + shift) % size) for i in range(size)])


def _walk(axis: str, shift: int, start: int, stop: int, keys: Keys, visit: Callable, state: Any) -> tuple[Any, Any]:
    """`visit(state, keys, following)` for the keys `start` to `stop` devices away; the next ones are under way meanwhile."""
    here = _send(axis, shift * start, keys) if start else keys

    def hop(carry: tuple, _: None) -> tuple:
        state, here = carry
        return visit(state, here, _send(axis, shift, here)), None

    if stop > start:
        (state, here), _ = jax.lax.scan(hop, (state, here), length=stop - start)
    return visit(state, here, ())
