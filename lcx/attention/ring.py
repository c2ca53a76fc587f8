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
from lcx.attention.local import Keys, Local, Queries, backward, cotangents, forward, nothing_seen, over_slices, wide_zeros
from lcx.attention.merge import Partial, merge


@dataclasses.dataclass(frozen=True)
class Hops:
    """How many devices before and after its own a device hears from. A whole ring is (n - 1, 0).

    Keys travel in `slices` parts, one after another: what is under way, and what the kernel lays out for it, is that much smaller.
    """

    before: int
    after: int = 0
    slices: int = 1


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

    def part(result: Partial, keys: Keys) -> tuple[Partial, None]:
        for shift, first, last in _legs(hops):
            result = _walk(axis, shift, first, last, keys, visit, result)
        return result, None

    return over_slices(part, nothing_seen(queries), keys, hops.slices)[0]


def _ring_forward(local: Local, axis: str, hops: Hops, queries: Queries, keys: Keys, bias_params: Any) -> tuple:
    whole = tuple(checkpoint_name(x, SAVED) for x in _forward(local, axis, hops, queries, keys, bias_params))
    return whole, (queries, keys, bias_params, whole)


def _ring_backward(local: Local, axis: str, hops: Hops, saved: tuple, cotangent: Partial) -> tuple:
    queries, keys, bias_params, whole = saved
    wide = whole[0].dtype
    pull = backward(local, queries, keys.k.shape[2], bias_params, whole, cotangent)

    def part(state: tuple, keys: Keys) -> tuple[tuple, tuple]:
        dkv = None
        for shift, first, last in _legs(hops):

            def visit(state: tuple, here: Keys, following: Any, shift: int = shift) -> tuple[tuple, Any]:
                dq, dbias, pending = state
                arrived = _send(axis, shift, pending)
                parts, (following, arrived) = pull(here, (following, arrived))
                dq_part, *dkv_part, dbias_part = parts
                dkv = jax.tree.map(lambda a, b: a + b.astype(wide), arrived, tuple(dkv_part))
                return (dq + dq_part, jax.tree.map(jnp.add, dbias, dbias_part), dkv), following

            *state, pending = _walk(axis, shift, first, last, keys, visit, (*state, wide_zeros((keys.k, keys.v))))
            # The last keys that were visited are `last` devices from home.
            home = _send(axis, -shift * last, pending) if last else pending
            dkv = home if dkv is None else jax.tree.map(jnp.add, dkv, home)
        return tuple(state), dkv

    (dq, dbias), dkv = over_slices(part, wide_zeros((queries.q, bias_params)), keys, hops.slices)
    return cotangents(queries, keys, bias_params, dq, dkv, dbias)


ring.defvjp(_ring_forward, _ring_backward)


def _legs(hops: Hops) -> list[tuple[int, int, int]]:
    """(direction in which keys move, first and last distance that is visited)."""
    return [(1, 0, hops.before)] + ([(-1, 1, hops.after)] if hops.after else [])


def _send(axis: str, shift: int, tree: Any) -> Any:
    """Every device's arrays to the device `shift` places on."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + shift) % size) for i in range(size)])


def _walk(axis: str, shift: int, first: int, last: int, keys: Keys, visit: Callable, state: Any) -> Any:
    """`visit(state, keys, following)` for the keys `first` to `last` devices away; the next ones are under way meanwhile."""
    here = _send(axis, shift * first, keys) if first else keys

    def hop(carry: tuple, _: None) -> tuple:
        state, here = carry
        return visit(state, here, _send(axis, shift, here)), None

    if last > first:
        (state, here), _ = jax.lax.scan(hop, (state, here), length=last - first)
    return visit(state, here, ())[0]
