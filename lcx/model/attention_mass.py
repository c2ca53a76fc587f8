"""How much attention a model pays to what lies far back: sums over the attention matrix, made block by block of queries.

The layers run as in a forward pass; next to each one's attention its weights are made once more for some queries at a time, so that
memory grows with the length and not with its square. For one device: sequences are not split over a mesh.

Legend: B batch, T tokens, N heads, L layers, C query chunks, K key blocks, R blocks of query rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.attend import attend
from lcx.attention.weights import attention_weights
from lcx.core.batch import PADDING, Index
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture
from lcx.model.transformer import LayerInputs, block, cast_params, embed, scan_layers

BLOCK_ELEMENTS = 1 << 24
"""Entries of the attention matrix that exist at a time."""

WeightsFn = Callable[[jax.Array | int, int, Index], jax.Array]
"""`(first, count, keys)` -> weights `[B, N, count, T]` of the queries from `first` on over all keys, whose index is given."""


@functools.partial(jax.jit, static_argnames=("arch", "chunk", "stride"))
def chunk_mass(params: Tree, buffers: Tree, tokens: jax.Array, arch: Architecture, chunk: int, stride: int) -> jax.Array:
    """Attention of query chunks to blocks of earlier keys, float32 `[B, L, C, K]`, for LADM (2503.02502).

    Rows of `tokens` `[B, T]`, T a multiple of `stride` and this of `chunk`: chunk C holds the `chunk` queries from C · `stride` on,
    block K as many keys. A query sees the keys before its chunk, without the first block, and its weights over them sum to 1 (to 0
    if there are none); they are summed over the chunk's queries and averaged over heads. Sinks have no part in it.
    """
    T = tokens.shape[1]
    starts, rows = jnp.arange(0, T, stride), _rows(arch, tokens, chunk)

    def of_layer(weights: WeightsFn, index: Index) -> jax.Array:
        def of_rows(place: tuple[jax.Array, jax.Array]) -> jax.Array:
            start, first = place
            seen = (index.order >= chunk) & (index.order < start)
            keys = dataclasses.replace(index, segments=jnp.where(seen, index.segments, PADDING))
            found = jnp.sum(jnp.mean(weights(first, rows, keys), axis=1), axis=1)
            return jnp.sum(found.reshape(-1, T // chunk, chunk), axis=2)

        firsts = starts[:, None] + jnp.arange(0, chunk, rows)[None]
        places = jnp.broadcast_to(starts[:, None], firsts.shape), firsts
        parts = jax.lax.map(lambda pairs: jnp.sum(jax.lax.map(of_rows, pairs), axis=0), places)
        return jnp.moveaxis(parts, 0, 1)

    size = (len(starts), T // chunk)
    return _by_layer(params, buffers, tokens, arch, of_layer, size)


@functools.partial(jax.jit, static_argnames=("arch",))
def distant_mass(
    params: Tree, buffers: Tree, tokens: jax.Array, lengths: jax.Array, distance: jax.Array, arch: Architecture
) -> tuple[jax.Array, jax.Array]:
    """Sums of the first layer's attention weights at a distance, and of their squares, float32 `[B, R, N]` each.

    For LongAttn (2502.16860). Of rows of `tokens` `[B, T]` the first `lengths` `[B]` count, and of their keys those at least
    `distance` `[B]` tokens before the query. Each of the R sums is over some queries: add them up in float64.
    """
    params, index = cast_params(params, arch), _index(tokens)
    kind = arch.config.pattern[0]
    here = LayerInputs.build(arch, kind, params, buffers, index)
    layer = jax.tree.map(lambda w: w[0], params["layers"])
    T = tokens.shape[1]
    rows = _rows(arch, tokens, T)

    def watch(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
        sinks = layer["attention"].get("sinks")
        weights = functools.partial(_weights, arch, kind, here, index, sinks, q, k)

        def of_rows(first: jax.Array) -> tuple[jax.Array, jax.Array]:
            query, key = first + jnp.arange(rows)[None, :, None], jnp.arange(T)[None, None]
            counts = (query - key >= distance[:, None, None]) & (query < lengths[:, None, None])
            found = jnp.where(counts[:, None], weights(first, rows, index), 0.0)
            return jnp.sum(found, axis=(2, 3)), jnp.sum(found * found, axis=(2, 3))

        mass, squares = jax.lax.map(of_rows, jnp.arange(0, T, rows))
        return jnp.zeros_like(q), (jnp.moveaxis(mass, 0, 1), jnp.moveaxis(squares, 0, 1))

    # What the block makes of the attention afterwards is not used, so that the compiler leaves it out.
    return block(layer, embed(params, buffers, arch, tokens, index.positions), arch, watch)[1]


def _by_layer(
    params: Tree, buffers: Tree, tokens: jax.Array, arch: Architecture, of_layer: Callable[..., jax.Array], size: tuple[int, ...]
) -> jax.Array:
    """`of_layer(weights, index)` `[B, *size]` of all layers, `[B, L, *size]`."""
    params, index = cast_params(params, arch), _index(tokens)
    inputs = {kind: LayerInputs.build(arch, kind, params, buffers, index) for kind in arch.config.kinds}

    def attention_fn(
        kind: str, nth: jax.Array | int, layer: Tree, state: dict[str, jax.Array], q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        here = inputs[kind]
        out = attend(
            arch.attention(kind), q, k, v, index, index,
            q_tables=here.tables, k_tables=here.tables, bias_params=here.bias, query_scale=here.query_scale,
            sinks=layer["attention"].get("sinks"),
        )  # fmt: skip
        found = of_layer(functools.partial(_weights, arch, kind, here, index, None, q, k), index)
        return out, {**state, kind: state[kind].at[nth].set(found)}

    kinds = arch.config.layer_kinds
    state = {kind: jnp.zeros((kinds.count(kind), tokens.shape[0], *size), jnp.float32) for kind in arch.config.kinds}
    x = embed(params, buffers, arch, tokens, index.positions)
    _, state, _ = scan_layers(params["layers"], x, arch, attention_fn, state)
    order = [state[kind][kinds[:i].count(kind)] for i, kind in enumerate(kinds)]
    return jnp.stack(order, axis=1)


def _weights(
    arch: Architecture, kind: str, inputs: LayerInputs, index: Index, sinks: Any, q: jax.Array, k: jax.Array,
    first: jax.Array | int, count: int, keys: Index,
) -> jax.Array:  # fmt: skip
    """The attention weights of a layer's `count` queries from `first` on."""

    def some(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)

    return attention_weights(
        arch.attention(kind), some(q), k, index.slice(first, count), keys,
        q_tables=jax.tree.map(some, inputs.tables), k_tables=inputs.tables, bias_params=inputs.bias,
        query_scale=None if inputs.query_scale is None else some(inputs.query_scale), sinks=sinks,
    )  # fmt: skip


def _index(tokens: jax.Array) -> Index:
    return Index.dense(*tokens.shape)


def _rows(arch: Architecture, tokens: jax.Array, most: int) -> int:
    """How many rows of the attention matrix are made at a time: the largest divisor of `most` whose rows fit `BLOCK_ELEMENTS`."""
    fit = max(1, BLOCK_ELEMENTS // (tokens.size * arch.config.num_heads))
    return next(rows for rows in range(min(most, fit), 0, -1) if most % rows == 0)
