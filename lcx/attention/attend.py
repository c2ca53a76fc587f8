"""One layer's attention: query scaling, kernel or mesh strategy, and sinks.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim, R rotary pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from lcx.attention.parallel.context import (
    ContextSpec,
    choose_strategy,
    context_parallel_attention,
    mesh_split,
    shard_map_attention,
)
from lcx.attention.parallel.head_groups import choose_groups, host_schedule
from lcx.attention.parallel.nested import parts_of
from lcx.attention.parallel.split_kv import split_kv
from lcx.attention.parallel.ulysses import check_heads, share_of_bias
from lcx.attention.partial import Partial, apply_sinks
from lcx.attention.plan import shard_spec
from lcx.attention.shard import KERNELS, KVShard, QueryShard, shard_attention
from lcx.attention.spec import AttentionSpec
from lcx.core.batch import Index
from lcx.core.errors import UserError
from lcx.core.mesh import axis_size, context_size, target_chip, target_platform
from lcx.positions.query_scaling import scale_queries
from lcx.positions.rotary import Tables

DEALT = 256
"""Tokens on a side of a tile, at most, where rows are dealt by their documents: tokens of a tile are as many times farther apart as
devices share a document, and larger tiles compute more pairs that nobody sees."""


def attend(
    spec: AttentionSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    *,
    q_tables: Tables,
    k_tables: Tables,
    bias_params: Any = None,
    query_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    cached: bool = False,
) -> jax.Array:
    """One layer's attention from raw (not rotated) queries and keys to `o_BTNH` in q's dtype.

    `q_tables` and `k_tables` come from `positions.rotary.tables`. `query_scale` is float32 `[B, T]` and multiplies q;
    `sinks` `[N]` enter the denominator once, after the regions are merged. All arrays except the indices are differentiable.

    `cached`: the keys are the slots of a cache. On a mesh that splits sequences they stay where they are
    (`attention.parallel.split_kv`), and there is no gradient.
    """
    T, N, S, K = *q_BTNH.shape[1:3], *k_BSKH.shape[1:3]
    q = scale_queries(q_BTNH, query_scale)
    queries = QueryShard(q, dataclasses.replace(q_index, reach=None, parts=None), q_tables)
    keys = KVShard(k_BSKH, v_BSKH, k_index, k_tables)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if context_size() > 1:
        if cached:
            o, lse = _cached_context_parallel(spec, mesh, wide, queries, keys, bias_params)
        else:
            o, lse = _context_parallel(spec, mesh, wide, queries, keys, bias_params, sinks is not None)
    else:
        shard = shard_spec(spec, q, wide if len(spec.scheme.regions) > 1 or sinks is not None else q.dtype, T, S, N, K)
        if not KERNELS[shard.kernel.kernel].partitionable and mesh.size > 1:
            # The compiler cannot split a Pallas call by itself.
            split = mesh_split(mesh, shard.kernel.kernel, queries, keys)
            run = functools.partial(shard_attention, split.shard(shard))
            o, lse = shard_map_attention(mesh, split, run, queries, keys, bias_params)
        else:
            o, lse = shard_attention(shard, queries, keys, bias_params)
    if sinks is not None:
        o, _ = apply_sinks(o, lse, sinks)
    return o.astype(q_BTNH.dtype)


def _context_parallel(
    spec: AttentionSpec, mesh: AbstractMesh, wide: Any, queries: QueryShard, keys: KVShard, bias_params: Any, sinks: bool
) -> Partial:
    B, T, N, H = queries.q.shape
    S, K = keys.k.shape[1:3]
    ring_size, share, layout = mesh.shape["ring"], mesh.shape["ulysses"], keys.index.layout
    if T % axis_size(mesh, "sequence") or S != T:
        raise UserError(f"{T} queries and {S} keys must be divisible by the {axis_size(mesh, 'sequence')} devices of mesh.context")
    check_heads(N, share)
    platform, tokens = target_platform(), T // ring_size
    chunk = {"zigzag": tokens // 2, "balanced": min(tokens, DEALT)}.get(layout)
    kernel = shard_spec(spec, queries.q, wide, tokens, tokens, N // share, max(1, K // share), chunk, mesh.size).kernel
    split = mesh_split(mesh, kernel.kernel, queries, keys)
    here, biased = split.share(mesh, B, T, N, K, H), kernel.bias is not None
    choice = choose_strategy(spec.strategy, spec.mask, layout, here, target_chip())
    index, parts = keys.index, None
    if choice.strategy == "nested":
        assert index.reach is not None  # as every balanced row has it
        parts = parts_of(index.reach, ring_size) if index.parts is None else index.parts
    index = dataclasses.replace(index, reach=index.reach if parts else None, parts=None)
    keys = dataclasses.replace(keys, index=index)
    groups = choose_groups(here, platform, choice.strategy, biased, spec.head_groups)
    if platform == "cpu" and choice.strategy != "gather":
        choice = choice._replace(schedule=host_schedule(choice.schedule, groups, biased, tokens))
    heads, kv_heads = here.of_group(groups)
    shard = split.shard(shard_spec(spec, queries.q, wide, tokens, tokens, heads, kv_heads, chunk, mesh.size))
    # Sinks enter after the last merge, and are the last to need o in full precision.
    plan = ContextSpec(choice, share_of_bias(shard, "ulysses") if share > 1 else shard, groups, wide if sinks else queries.q.dtype)

    def run(queries: QueryShard, keys: KVShard, given: Any) -> Partial:
        return context_parallel_attention(plan, queries, keys, *given)

    return shard_map_attention(mesh, split, run, queries, keys, (bias_params, parts))


def _cached_context_parallel(
    spec: AttentionSpec, mesh: AbstractMesh, wide: Any, queries: QueryShard, keys: KVShard, bias_params: Any
) -> Partial:
    T, N, S, K = *queries.q.shape[1:3], *keys.k.shape[1:3]
    size = axis_size(mesh, "sequence")
    shard, spread = shard_spec(spec, queries.q, wide, T, S // size, N, K, None, mesh.size), T % size == 0
    split = mesh_split(mesh, shard.kernel.kernel, queries, keys)
    run = functools.partial(split_kv, split.shard(shard), spread)
    return shard_map_attention(mesh, split, run, queries, keys, bias_params, spread)
