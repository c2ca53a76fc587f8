"""Attention of one chunk of a row's queries to the keys of all chunks so far, which are kept apart from the row's activations.

A chunk's queries visit the chunks of keys that the mask may show them, one after another, and merge what they find; the backward
pass visits the same ones and adds to the gradients that each has collected from later queries. Chunks that are hidden, or not
written yet, cost nothing: how many are visited is decided while the program runs. Where devices have a memory of their own, keys,
values and their gradients are in that of the host (OOMB, arXiv 2602.02108, with every key rather than some of them).

Legend: L layers of a kind, n chunks of a row, B batch, C tokens of a chunk, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.blockwise import SAVED
from lcx.attention.partial import Partial, apply_sinks, merge, zeros_fp32
from lcx.attention.plan import shard_spec
from lcx.attention.shard import KVShard, QueryShard, nothing_seen, shard_attention, shard_vjp
from lcx.attention.spec import AttentionSpec, ShardSpec
from lcx.attention.tiles import visits
from lcx.core.batch import Index, cut_tokens
from lcx.core.mask import Bounds, bounds
from lcx.core.mesh import target_platform
from lcx.positions.query_scaling import scale_queries
from lcx.positions.rotary import Tables, tables
from lcx.positions.scheme import SchemeSpec


@flax.struct.dataclass
class KeyChunks:
    """Keys (not rotated) and values of the layers of a kind, or the gradients of both: `both` is `[L·n, 2, B, C, K, H]`.

    `count` is n. Layers and chunks share an axis because a TPU copies to and from its host's memory along one only.
    """

    both: jax.Array
    count: int = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(cls, layers: int, count: int, shape: tuple[int, ...], dtype: Any) -> KeyChunks:
        """Zeros for chunks of a shape `[B, C, K, H]`."""
        return cls(_blank(layers * count, (2, *shape), dtype), count)

    def read(self, nth: jax.Array | int, chunk: jax.Array) -> jax.Array:
        """Keys and values `[2, B, C, K, H]` of a chunk in the `nth` layer."""
        return _near(jax.lax.dynamic_slice_in_dim(self.both, nth * self.count + chunk, 1)[0])

    def write(self, nth: jax.Array | int, chunk: jax.Array, new: jax.Array) -> KeyChunks:
        """The same with other keys and values in a chunk of the `nth` layer; in place where this one is not used again."""
        new = _away(new[None].astype(self.both.dtype))
        return KeyChunks(jax.lax.dynamic_update_slice_in_dim(self.both, new, nth * self.count + chunk, 0), self.count)


@flax.struct.dataclass
class RowChunks:
    """What attention knows of a row's chunks: their indices `[n, B, C]`, the extremes `[B, n]` of these, and the rotations of the
    scheme (`buffers[kind]["rotations"]`)."""

    index: Index
    extremes: Bounds
    rotations: Any

    @classmethod
    def build(cls, index: Index, chunk: int, rotations: Any) -> RowChunks:
        """Of rows with the index `[B, T]`, T a multiple of `chunk` tokens."""
        return cls(cut_tokens(index, index.order.shape[1] // chunk), bounds(index, chunk), rotations)

    def index_of(self, chunk: jax.Array) -> Index:
        """The index `[B, C]` of a chunk."""
        return jax.tree.map(lambda x: x[chunk], self.index)

    def tables(self, scheme: SchemeSpec, chunk: jax.Array) -> Tables:
        """Rotary tables of a chunk's positions."""
        return tables(scheme, {"rotations": self.rotations}, self.index.positions[chunk])


@flax.struct.dataclass
class Chunk:
    """A chunk of queries: its number, and the chunks of keys that it visits, `visited[:count]`, int32 each."""

    number: jax.Array
    visited: jax.Array
    count: jax.Array

    @classmethod
    def build(cls, spec: AttentionSpec, row: RowChunks, number: jax.Array) -> Chunk:
        """The chunk of that number under the layers' mask."""
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number, 1, axis=1), row.extremes)
        visited, _, count = visits(spec.mask, own, row.extremes)
        return cls(number, visited, count)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    shard: ShardSpec
    scheme: SchemeSpec


def attend_to_chunks(
    spec: AttentionSpec,
    q_BCNH: jax.Array,
    k_BCKH: jax.Array,
    v_BCKH: jax.Array,
    keys: KeyChunks,
    gradients: Any,
    nth: jax.Array | int,
    row: RowChunks,
    chunk: Chunk,
    *,
    q_tables: Tables,
    bias_params: Any = None,
    query_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One layer's attention from the raw queries of a chunk to `o_BCNH` in q's dtype, and `gradients` as they are.

    `keys` holds the chunks up to this one, whose keys and values `k_BCKH` and `v_BCKH` are there already. `gradients`, a float32
    `KeyChunks` like `keys` (None where nothing is differentiated), stands in for `keys` in differentiation: its cotangent holds the
    gradients from later chunks on the way in, and with this chunk's contributions on the way out. Those of this chunk's own keys
    and values go to `k_BCKH` and `v_BCKH`, and its place is not read again. The rest is as in `attention.attend.attend`.
    """
    q = scale_queries(q_BCNH, query_scale)
    C, N, K = *q.shape[1:3], k_BCKH.shape[2]
    plan = _Plan(shard_spec(spec, q, jnp.promote_types(q.dtype, jnp.float32), C, C, N, K), spec.scheme)
    found: Any = _attend(plan, q, k_BCKH, v_BCKH, bias_params, gradients, (keys, jnp.int32(nth), row, chunk, q_tables))
    (o, lse), gradients = found
    if sinks is not None:
        o, _ = apply_sinks(o, lse, sinks)
    return o.astype(q_BCNH.dtype), gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, bias_params: Any, gradients: Any, where: tuple
) -> tuple[Partial, Any]:
    return _forward(plan, q, bias_params, where), gradients


def _forward(plan: _Plan, q: jax.Array, bias_params: Any, where: tuple) -> Partial:
    keys, nth, row, chunk, q_tables = where
    queries = QueryShard(q, row.index_of(chunk.number), q_tables)

    def visit(i: jax.Array, result: Partial) -> Partial:
        return merge(result, shard_attention(plan.shard, queries, _shard(plan, keys, nth, row, chunk.visited[i]), bias_params))

    return jax.lax.fori_loop(0, chunk.count, visit, nothing_seen(queries))


def _attend_fwd(plan, q, k, v, bias_params, gradients, where):
    o, lse = (checkpoint_name(x, SAVED) for x in _forward(plan, q, bias_params, where))
    return ((o, lse), gradients), (q, bias_params, o, lse, where)


def _attend_bwd(plan, saved, cotangents):
    q, bias_params, o, lse, (keys, nth, row, chunk, q_tables) = saved
    cotangent, gradients = cotangents
    queries = QueryShard(q, row.index_of(chunk.number), q_tables)
    pull = shard_vjp(plan.shard, queries, keys.both.shape[-2], bias_params, (o, lse), cotangent)

    def visit(i: jax.Array, sums: tuple) -> tuple:
        *own, gradients = sums
        j = chunk.visited[i]
        (dq, dk, dv, dbias), _ = pull.step(_shard(plan, keys, nth, row, j), ())
        dkv = jnp.stack([dk, dv])
        mine = jnp.where(j == chunk.number, dkv, 0.0)
        return *jax.tree.map(jnp.add, own, [dq, dbias, mine]), gradients.write(nth, j, gradients.read(nth, j) + dkv)

    # What later queries have found of this chunk's keys is read first and summed apart: read afterwards, when nothing but the order
    # of two operations keeps it from being changed, it would make the compiler copy all gradients.
    later = gradients.read(nth, chunk.number)
    dq, dbias, dkv, gradients = jax.lax.fori_loop(0, chunk.count, visit, (pull.init, zeros_fp32(bias_params), later, gradients))
    dk, dv = dkv.astype(keys.both.dtype)
    dbias = jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias_params)
    return pull.finalize(dq).astype(q.dtype), dk, dv, dbias, gradients, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _shard(plan: _Plan, keys: KeyChunks, nth: jax.Array, row: RowChunks, j: jax.Array) -> KVShard:
    k, v = keys.read(nth, j)
    return KVShard(k, v, row.index_of(j), row.tables(plan.scheme, j))


def _away(x: jax.Array) -> jax.Array:
    """Where chunks are kept: in the host's memory, if the device has its own."""
    return x if target_platform() == "cpu" else jax.device_put(x, jax.memory.Space.Host)


def _blank(count: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros `[count, *shape]` where chunks are kept; the device never has them all."""
    if target_platform() == "cpu":
        return jnp.zeros((count, *shape), dtype)
    _, zeros = jax.lax.scan(lambda _, i: (None, _away(jnp.zeros(shape, dtype))), None, length=count)
    return zeros


def _near(x: jax.Array) -> jax.Array:
    """Back where it is computed with."""
    return x if target_platform() == "cpu" else jax.device_put(x, jax.memory.Space.Device)
