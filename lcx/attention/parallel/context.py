"""Attention over a sequence that is split over the mesh: which strategy serves a layer, and the `shard_map` around it.

Legend: B batch, T tokens, N heads, K KV heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from lcx.attention.parallel.gather import gather
from lcx.attention.parallel.ring import RingSchedule, ring
from lcx.attention.parallel.ulysses import kv_copies, share_of_bias, ulysses
from lcx.attention.partial import Partial
from lcx.attention.shard import KERNELS, KVShard, QueryShard
from lcx.attention.spec import ShardSpec, Strategy
from lcx.core.batch import SequenceLayout
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.core.mesh import RULES, SEQUENCE, axis_size

RING_TOKENS = 12_288
"""Query tokens per device times heads per KV head above which a ring hides its transfers: 3K tokens for Llama 3 on a TPU v5p."""


CPU_HOP = 2**21
"""Logits of a hop down to which host devices process fewer heads at a time: they share their memory, so savings count for all
of them."""


class ContextChoice(NamedTuple):
    """The decision of `choose_strategy`: the devices whose keys are needed, and in how many slices."""

    strategy: Strategy
    schedule: RingSchedule
    reason: str


def choose_strategy(
    strategy: Strategy | Literal["auto"], mask: Mask, layout: SequenceLayout, length: int, ring_size: int, group: int
) -> ContextChoice:
    """How `ring_size` devices of the ring share rows of `length` tokens under a mask, and why; `group` is N / K.

    Raises `UserError` if the requested strategy cannot be exact.
    """
    shard = length // ring_size
    whole = RingSchedule(ring_size - 1)
    near = _window_hops(mask, layout, shard, ring_size)
    if strategy == "window" and near is None:
        raise UserError(
            "strategy 'window' needs a window that ends within the ring, no prefix, and a contiguous or zigzag layout "
            f"(window={mask.window}, prefix={mask.prefix}, layout={layout!r}); choose 'ring'"
        )
    why = "requested"
    if strategy == "auto":
        many = shard * group >= RING_TOKENS
        strategy = "window" if near is not None else "ring" if many else "gather"
        enough = f"{shard:,} tokens per device with {group} heads per KV head are {'enough' if many else 'too few'} to hide a ring"
        why = (
            f"a window of {mask.window} reaches {near.before} devices before and {near.after} after" if near is not None else enough
        )
    schedule = near if strategy == "window" and near is not None else whole
    # When gathering, a slice of every shard adds up to what one device holds. A ring needs large messages.
    slices = next(n for n in range(min(ring_size, shard), 0, -1) if shard % n == 0) if strategy == "gather" else 1
    return ContextChoice(strategy, dataclasses.replace(schedule, slices=slices), f"{strategy}: {why}")


def host_parts(schedule: RingSchedule, biased: bool, rows: int, tokens: int, heads: int, kv_heads: int) -> RingSchedule:
    """How host devices that hold `rows` of `tokens` tokens walk a ring: by groups of heads; or by halves of the keys if there is a
    bias, which is computed for all heads at once, or if no other device has keys."""
    if biased or not schedule.before + schedule.after:
        return dataclasses.replace(schedule, slices=2 if tokens % 2 == 0 else 1)
    fits = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and rows * tokens**2 * (heads // n) >= CPU_HOP)
    return dataclasses.replace(schedule, groups=max(fits, default=1))


def _window_hops(mask: Mask, layout: SequenceLayout, shard: int, ring_size: int) -> RingSchedule | None:
    """The neighbours that a window reaches; None if it reaches all devices, or one that is not a neighbour."""
    if mask.window is None or mask.prefix or layout == "striped":
        return None
    reach = -(-(mask.window - 1) // (shard // 2 if layout == "zigzag" else shard))
    # Of a device's two zigzag chunks one has its predecessor on the device before, the other on the device after.
    schedule = RingSchedule(reach, 0 if mask.causal and layout == "contiguous" else reach)
    return schedule if schedule.before + schedule.after < ring_size - 1 else None


class MeshSplit(NamedTuple):
    """Mesh axes that `shard_map` handles, and how it splits arrays `[B, T, ...]` of tokens and `[B, T, N, ...]` of heads."""

    axes: set[str]
    tokens: PartitionSpec
    heads: PartitionSpec

    def shard(self, spec: ShardSpec) -> ShardSpec:
        """`spec` for a device's share of the heads."""
        return share_of_bias(spec, "tensor") if len(self.heads) > 2 and self.heads[2] else spec

    def sizes(self, mesh: AbstractMesh, B: int, N: int, K: int) -> tuple[int, int, int]:
        """Rows, heads and KV heads that a device computes with, after an exchange of heads over `ulysses`."""
        rows = B // axis_size(mesh, "batch") if self.heads[0] else B
        tensor, share = mesh.shape["tensor"] if len(self.heads) > 2 and self.heads[2] else 1, mesh.shape["ulysses"]
        kv_heads = K // tensor
        return rows, N // tensor // share, kv_heads * kv_copies(kv_heads, share) // share


def mesh_split(mesh: AbstractMesh, kernel: str, queries: QueryShard, keys: KVShard) -> MeshSplit:
    """The sequence axes only; or the whole mesh for a kernel that the compiler cannot split over rows and heads by itself."""
    if KERNELS[kernel].partitionable:
        return MeshSplit(set(SEQUENCE), PartitionSpec(None, SEQUENCE), PartitionSpec(None, SEQUENCE))
    B, _, N, _ = queries.q.shape
    tensor, share = mesh.shape["tensor"], mesh.shape["tensor"] * mesh.shape["ulysses"]
    rows = RULES["batch"] if B % axis_size(mesh, "batch") == 0 else None
    heads = "tensor" if N % share == 0 and keys.k.shape[2] % tensor == 0 else None
    return MeshSplit(set(mesh.axis_names), PartitionSpec(rows, SEQUENCE), PartitionSpec(rows, SEQUENCE, heads))


def shard_map_attention(
    mesh: AbstractMesh,
    split: MeshSplit,
    run: Callable[[QueryShard, KVShard, Any], Partial],
    queries: QueryShard,
    keys: KVShard,
    bias_params: Any,
    spread: bool = True,
) -> Partial:
    """`run(queries, keys, bias_params)` on the rows, tokens and heads of each device, for global arrays.

    Without `spread` every device has all query tokens.
    """
    # `shard_map` takes specs in the places of the arguments' arrays.
    q_at: Any = split if spread else split._replace(tokens=_whole(split.tokens), heads=_whole(split.heads))
    k_at: Any = split
    q_specs = QueryShard(q_at.heads, q_at.tokens, q_at.tokens)
    k_specs = KVShard(k_at.heads, k_at.heads, k_at.tokens, k_at.tokens)
    return jax.shard_map(
        run, mesh=mesh, in_specs=(q_specs, k_specs, PartitionSpec()), out_specs=q_at.heads, axis_names=split.axes, check_vma=False
    )(queries, keys, bias_params)


def _whole(spec: PartitionSpec) -> PartitionSpec:
    """The same split, except that tokens are not split."""
    return PartitionSpec(*(None if axes == SEQUENCE else axes for axes in spec))


def context_parallel_attention(
    choice: ContextChoice, shard: ShardSpec, exchange: bool, queries: QueryShard, keys: KVShard, bias_params: Any
) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider of a device's own tokens; inside `shard_map` over the mesh's sequence axes.

    `exchange`: devices trade tokens for heads first (ulysses).
    """
    shard = share_of_bias(shard, "ulysses") if exchange else shard

    def attention(queries: QueryShard, keys: KVShard) -> Partial:
        if choice.strategy == "gather":
            return gather(shard, "ring", choice.schedule.slices, queries, keys, bias_params)
        return ring(shard, "ring", choice.schedule, queries, keys, bias_params)

    return ulysses(attention, "ulysses", queries, keys) if exchange else attention(queries, keys)
