"""Attention over a sequence that is split over the mesh: which strategy serves a layer, and the `shard_map` around it.

Legend: B batch, T tokens, N heads, K KV heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from lcx.attention.blockwise import SAVED
from lcx.attention.parallel.cost import SplitCost
from lcx.attention.parallel.gather import gather, gather_backward
from lcx.attention.parallel.head_groups import HeadGroups, Share
from lcx.attention.parallel.nested import Parts, nested, nested_backward
from lcx.attention.parallel.ring import RingSchedule, ring, ring_backward, window_hops
from lcx.attention.parallel.ulysses import (
    heads_for_tokens,
    keys_for_tokens,
    of_all_tokens,
    share_of_bias,
    tokens_for_heads,
    tokens_for_keys,
)
from lcx.attention.partial import Partial, zeros_fp32
from lcx.attention.shard import KERNELS, Gradients, KVShard, QueryShard, map_head_groups
from lcx.attention.spec import ShardSpec, Strategy
from lcx.core.batch import SequenceLayout
from lcx.core.chips import Chip
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.core.mesh import RULES, SEQUENCE, axis_size


class ContextChoice(NamedTuple):
    """The decision of `choose_strategy`: the devices whose keys are needed, and in how many slices."""

    strategy: Strategy
    schedule: RingSchedule
    reason: str


def choose_strategy(
    strategy: Strategy | Literal["auto"], mask: Mask, layout: SequenceLayout, share: Share, chip: Chip
) -> ContextChoice:
    """How the devices of a ring share rows under a mask, and why; `share` is what one of them works on.

    Raises `UserError` if the requested strategy cannot be exact.
    """
    if strategy == "nested" and layout != "balanced":
        raise UserError(f"strategy 'nested' needs rows whose layout is balanced, not {layout!r}; choose 'ring'")
    shard, ring_size = share.tokens, share.ring
    whole = RingSchedule(ring_size - 1)
    near = window_hops(mask, layout, shard, ring_size)
    if strategy == "window" and near is None:
        raise UserError(
            "strategy 'window' needs a window that ends within the ring, no prefix, and a contiguous or zigzag layout "
            f"(window={mask.window}, prefix={mask.prefix}, layout={layout!r}); choose 'ring'"
        )
    why = "requested"
    if strategy == "auto" and layout == "balanced":
        strategy, why = "nested", "keys go to the devices that have queries of their document"
    elif strategy == "auto":
        strategy, why = _cheapest(mask, layout, near, share, chip)
    schedule = near if strategy == "window" and near is not None else whole
    # When gathering, a slice of every shard adds up to what one device holds. A ring needs large messages.
    slices = next(n for n in range(min(ring_size, shard), 0, -1) if shard % n == 0) if strategy == "gather" else 1
    return ContextChoice(strategy, dataclasses.replace(schedule, slices=slices), f"{strategy}: {why}")


def _cheapest(mask: Mask, layout: SequenceLayout, near: RingSchedule | None, share: Share, chip: Chip) -> tuple[Strategy, str]:
    """The strategy that takes least time on devices of a kind, and why; `near` are the neighbours that a window reaches."""
    strategy: Strategy = "ring"
    way = "a ring"
    if near is not None:
        strategy, way = "window", f"a window that reaches {near.before} devices before and {near.after} after"
    if chip.platform == "cpu":
        return strategy, f"{way}; between devices of one host there is nothing to hide"
    cost = SplitCost(share, chip)
    around, gathered = 1e3 * cost.ring(mask, layout), 1e3 * cost.gather(mask, layout)
    why = f"by arithmetic {way} takes {around:.3g} ms a layer and a gather {gathered:.3g}"
    return (strategy, why) if around <= gathered else ("gather", why)


class MeshSplit(NamedTuple):
    """Mesh axes that `shard_map` handles, and how it splits arrays `[B, T, ...]` of tokens and `[B, T, N, ...]` of heads."""

    axes: set[str]
    tokens: PartitionSpec
    heads: PartitionSpec

    def shard(self, spec: ShardSpec) -> ShardSpec:
        """`spec` for a device's share of the heads."""
        return share_of_bias(spec, "tensor") if len(self.heads) > 2 and self.heads[2] else spec

    def share(self, mesh: AbstractMesh, B: int, T: int, N: int, K: int, H: int) -> Share:
        """What a device works on."""
        rows = B // axis_size(mesh, "batch") if self.heads[0] else B
        tensor = mesh.shape["tensor"] if len(self.heads) > 2 and self.heads[2] else 1
        return Share(rows, T // mesh.shape["ring"], N // tensor, K // tensor, H, mesh.shape["ulysses"], mesh.shape["ring"])


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


@dataclasses.dataclass(frozen=True)
class ContextSpec:
    """All that is static about a layer's attention over a split sequence: `shard` is for one group of heads, `groups` says how many
    there are; o is returned in `out_dtype`."""

    choice: ContextChoice
    shard: ShardSpec
    groups: HeadGroups
    out_dtype: Any

    def forward(self, queries: QueryShard, keys: KVShard, bias_params: Any, parts: Parts | None) -> Partial:
        """Of one group of heads, after the exchange."""
        _, schedule, _ = self.choice
        if parts is not None:
            return nested(self.shard, "ring", parts, queries, keys, bias_params)
        if self.choice.strategy == "gather":
            return gather(self.shard, "ring", schedule.slices, queries, keys, bias_params)
        return ring(self.shard, "ring", schedule, queries, keys, bias_params)

    def backward(
        self, queries: QueryShard, keys: KVShard, bias_params: Any, parts: Parts | None, whole: Partial, cotangent: Partial
    ) -> Gradients:
        """The same, backward."""
        _, schedule, _ = self.choice
        if parts is not None:
            return nested_backward(self.shard, "ring", parts, queries, keys, bias_params, whole, cotangent)
        if self.choice.strategy == "gather":
            return gather_backward(self.shard, "ring", schedule.slices, queries, keys, bias_params, whole, cotangent)
        return ring_backward(self.shard, "ring", schedule, queries, keys, bias_params, whole, cotangent)


U = "ulysses"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def context_parallel_attention(
    plan: ContextSpec, queries: QueryShard, keys: KVShard, bias_params: Any, parts: Parts | None = None
) -> Partial:
    """`(o_BTNH, lse_BTN)` of a device's own tokens, lse in float32 or wider; inside `shard_map` over the mesh's sequence axes.

    `parts` are those of `nested.parts_of`, for that strategy alone.

    Where the `ulysses` axis has several devices they trade tokens for heads first. All strategies share this forward and backward
    pass: group after group of heads, which are exchanged, attended over the ring, and exchanged back. The backward pass keeps
    o and lse of the device's own tokens alone.
    """
    q_side, k_side = (of_all_tokens(U, (side.index, side.tables)) for side in (queries, keys))

    def kv_group(_: None, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[None, Partial]:
        here = KVShard(keys_for_tokens(U, k), keys_for_tokens(U, v), *k_side)

        def query_group(_: None, q: jax.Array) -> tuple[None, Partial]:
            o, lse = plan.forward(QueryShard(heads_for_tokens(U, q), *q_side), here, bias_params, parts)
            return None, (tokens_for_heads(U, o.astype(plan.out_dtype)), tokens_for_heads(U, lse))

        return map_head_groups(query_group, plan.groups.queries, None, _nothing(plan, q), (q,), k.shape[2])

    return map_head_groups(kv_group, plan.groups.kv, None, _nothing(plan, queries.q), (queries.q, keys.k, keys.v))[1]


def _nothing(plan: ContextSpec, q: jax.Array) -> Partial:
    return jnp.zeros(q.shape, plan.out_dtype), jnp.zeros(q.shape[:3], jnp.promote_types(q.dtype, jnp.float32))


def _forward(plan: ContextSpec, queries: QueryShard, keys: KVShard, bias_params: Any, parts: Parts | None) -> tuple:
    found: Any = context_parallel_attention(plan, queries, keys, bias_params, parts)
    whole = tuple(checkpoint_name(x, SAVED) for x in found)
    return whole, (queries, keys, bias_params, parts, whole)


def _backward(plan: ContextSpec, saved: tuple, cotangent: Partial) -> tuple:
    queries, keys, bias_params, parts, whole = saved
    q_side, k_side = (of_all_tokens(U, (side.index, side.tables)) for side in (queries, keys))

    def kv_group(dbias: Any, q: jax.Array, k: jax.Array, v: jax.Array, *of_q: jax.Array) -> tuple:
        here = KVShard(keys_for_tokens(U, k), keys_for_tokens(U, v), *k_side)

        def query_group(sums: Any, q: jax.Array, *of_q: jax.Array) -> tuple:
            o, lse, do, dlse = (heads_for_tokens(U, x) for x in of_q)
            found = plan.backward(QueryShard(heads_for_tokens(U, q), *q_side), here, bias_params, parts, (o, lse), (do, dlse))
            sums = jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, (found.k, found.v, found.bias))
            return sums, (tokens_for_heads(U, found.q.astype(q.dtype)),)

        none = (*zeros_fp32((here.k, here.v)), dbias)
        (dk, dv, dbias), (dq,) = map_head_groups(
            query_group, plan.groups.queries, none, (jnp.zeros_like(q),), (q, *of_q), k.shape[2]
        )
        return dbias, (dq, tokens_for_keys(U, dk, k), tokens_for_keys(U, dv, v))

    inputs = queries.q, keys.k, keys.v
    dbias, (dq, dk, dv) = map_head_groups(
        kv_group, plan.groups.kv, zeros_fp32(bias_params), tuple(map(jnp.zeros_like, inputs)), (*inputs, *whole, *cotangent)
    )
    nothing = functools.partial(jax.tree.map, jnp.zeros_like)
    index: Any = None
    return (
        QueryShard(dq, index, nothing(queries.tables)),
        KVShard(dk, dv, index, nothing(keys.tables)),
        jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias_params),
        None,
    )


context_parallel_attention.defvjp(_forward, _backward)
