"""Ring attention: keys and values travel from device to device while every device works on those it has (arXiv 2310.01889).

Keys travel unrotated, unrepeated and in their own dtype, with their index and rotary tables; results are merged in float32. The
backward pass travels the same way and carries the pending gradients of the travelling keys along. Nothing depends on which tokens
a device holds, so every layout is correct; the kernel skips, block by block, what the mask rules out.

Must be called inside `jax.shard_map`. Legend: B batch, T tokens of one device, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.partial import Partial, merge, zeros_fp32
from lcx.attention.shard import Gradients, KVShard, QueryShard, nothing_seen, scan_key_slices, shard_attention, shard_vjp
from lcx.attention.spec import ShardSpec
from lcx.core.batch import SequenceLayout
from lcx.core.mask import Mask


@dataclasses.dataclass(frozen=True)
class RingSchedule:
    """From how many devices before and after its own a device receives keys. A whole ring is (n - 1, 0).

    Keys travel in `slices` parts, one after another: what is in transfer, and what the kernel allocates for it, is so much smaller.
    """

    before: int
    after: int = 0
    slices: int = 1


def window_hops(mask: Mask, layout: SequenceLayout, shard: int, ring_size: int) -> RingSchedule | None:
    """The neighbours that a window reaches from devices of `shard` tokens; None if it reaches all devices, or one that is not a
    neighbour."""
    if mask.window is None or mask.prefix or layout in ("striped", "balanced"):
        return None
    reach = -(-(mask.window - 1) // (shard // 2 if layout == "zigzag" else shard))
    # Of a device's two zigzag chunks one has its predecessor on the device before, the other on the device after.
    schedule = RingSchedule(reach, 0 if mask.causal and layout == "contiguous" else reach)
    return schedule if schedule.before + schedule.after < ring_size - 1 else None


def ring(shard: ShardSpec, axis: str, schedule: RingSchedule, queries: QueryShard, keys: KVShard, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider of the queries here over the keys that `schedule` brings along mesh axis `axis`."""

    def visit(so_far: Partial, here: KVShard, following: Any) -> tuple[Partial, Any]:
        part = shard_attention(shard, queries, here, bias_params)
        # Keeps the compiler from moving the transfer after the kernel, where only the merge would be left to hide it.
        following, part = jax.lax.optimization_barrier((following, part))
        return merge(so_far, part), following

    def part(result: Partial, keys: KVShard) -> tuple[Partial, None]:
        for shift, first, last in _directions(schedule):
            result = _pass_around(axis, shift, first, last, keys, visit, result)
        return result, None

    return scan_key_slices(part, nothing_seen(queries), keys, schedule.slices)[0]


def ring_backward(
    shard: ShardSpec,
    axis: str,
    schedule: RingSchedule,
    queries: QueryShard,
    keys: KVShard,
    bias_params: Any,
    whole: Partial,
    cotangent: Partial,
) -> Gradients:
    """The gradients of `ring`, from its result `whole` and the cotangent of that."""
    wide = whole[1].dtype
    pull = shard_vjp(shard, queries, keys.k.shape[2], bias_params, whole, cotangent)

    def part(state: tuple, keys: KVShard) -> tuple[tuple, tuple]:
        dkv: Any = None
        for shift, first, last in _directions(schedule):

            def visit(state: tuple, here: KVShard, following: Any, shift: int = shift) -> tuple[tuple, Any]:
                dq, dbias, pending = state
                arrived = _send(axis, shift, pending)
                (dq_part, dk, dv, dbias_part), (following, arrived) = pull.step(here, (following, arrived))
                pending = arrived + jnp.stack((dk, dv)).astype(wide)
                return (*jax.tree.map(jnp.add, (dq, dbias), (dq_part, dbias_part)), pending), following

            nothing = jnp.zeros((2, *keys.k.shape), wide)  # dk and dv travel as one array: see `_send`
            *reached, pending = _pass_around(axis, shift, first, last, keys, visit, (*state, nothing))
            state = tuple(reached)
            # The last keys that were visited are `last` devices from home.
            home = _send(axis, -shift * last, pending) if last else pending
            dkv = home if dkv is None else jax.tree.map(jnp.add, dkv, home)
        return state, tuple(dkv)

    (dq, dbias), (dk, dv) = scan_key_slices(part, (pull.init, zeros_fp32(bias_params)), keys, schedule.slices)
    return Gradients(pull.finalize(dq), dk, dv, dbias)


def _directions(schedule: RingSchedule) -> list[tuple[int, int, int]]:
    """(direction in which keys move, first and last distance visited)."""
    return [(1, 0, schedule.before)] + ([(-1, 1, schedule.after)] if schedule.after else [])


def _send(axis: str, shift: int, tree: Any) -> Any:
    """Sends every device's arrays to the device `shift` places on; arrays of one shape and dtype as one, except keys and values.

    A TPU has five transfers in progress at a time, and one that has to wait for another is not hidden behind a kernel. So the index
    travels as one array, as do sine and cosine, and dk and dv. Keys and values, the largest, would have to be copied for it.
    """
    if isinstance(tree, KVShard):
        rest = _send(axis, shift, (tree.index, tree.tables))
        k, v = (_permute(axis, shift, x) for x in (tree.k, tree.v))
        return KVShard(k, v, *rest)
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault((leaf.shape, leaf.dtype), []).append(i)
    for members in groups.values():
        if len(members) > 1:
            moved = _permute(axis, shift, jnp.stack([leaves[i] for i in members]))
        else:
            moved = [_permute(axis, shift, leaves[members[0]])]
        for i, leaf in zip(members, moved, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def _permute(axis: str, shift: int, x: jax.Array) -> jax.Array:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + shift) % size) for i in range(size)])


def _pass_around(axis: str, shift: int, first: int, last: int, keys: KVShard, visit: Callable, state: Any) -> Any:
    """`visit(state, keys, following)` for the keys `first` to `last` devices away; the next ones are in transfer meanwhile."""
    here = _send(axis, shift * first, keys) if first else keys

    def hop(carry: tuple, _: None) -> tuple:
        state, here = carry
        return visit(state, here, _send(axis, shift, here)), None

    if last > first:
        (state, here), _ = jax.lax.scan(hop, (state, here), length=last - first)
    return visit(state, here, ())[0]
