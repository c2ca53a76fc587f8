"""Shared by the kernels for TPUs and for GPUs: how arrays are cut into tiles, and which pairs of tiles need work.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim, `rows` = G·block_q. Queries are cut into
tiles `[B, K, T/block_q, rows, H]`, with the G query heads of a KV head stacked along the rows, so that keys are never repeated;
keys into tiles `[B, K, S/block_k, block_k, H]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx.attention.dense import MASKED
from lcx.attention.partial import Partial
from lcx.attention.spec import Blocks, KernelSpec
from lcx.attention.tiles import fold, fold_index, row_terms, unfold
from lcx.core.batch import Index
from lcx.core.mask import Bounds, Mask, bounds, sees

FIELDS = ("order", "positions", "segments", "is_prefix")
BOUNDS = tuple(field.name for field in dataclasses.fields(Bounds))


class Tiles(NamedTuple):
    """The arrays of a call in tiles, and their tokens' indices: `[B, T/block_q, 4, rows]` and `[B, S/block_k, 4, block_k]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_tokens: jax.Array
    k_tokens: jax.Array
    slopes: jax.Array

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows of the batch, KV heads, blocks of queries and blocks of keys: the size of the grid."""
        B, K, q_blocks, _, _ = self.q.shape
        return B, K, q_blocks, self.k.shape[2]


class QueryTiles(NamedTuple):
    """The queries' side of `Tiles`, and their original index."""

    q: jax.Array
    tokens: jax.Array
    slopes: jax.Array
    index: Index


def make_query_tiles(spec: KernelSpec, q_BTNH: jax.Array, q_index: Index, slopes_N: jax.Array | None, kv_heads: int) -> QueryTiles:
    """Tiles of the queries; the tail is zeros of segment 0, hence padding."""
    group = q_BTNH.shape[2] // kv_heads
    slopes = jnp.zeros(kv_heads * group, jnp.float32) if slopes_N is None else slopes_N.astype(jnp.float32)
    slopes = jnp.repeat(slopes.reshape(kv_heads, 1, group), spec.tiles.q, axis=2)
    return QueryTiles(split_heads(q_BTNH, spec.tiles.q, kv_heads), _tokens(q_index, spec.tiles.q, group), slopes, q_index)


def make_tiles(spec: KernelSpec, queries: QueryTiles, k_BSKH: jax.Array, v_BSKH: jax.Array, k_index: Index) -> Tiles:
    """The arguments of a kernel in tiles."""
    k, v = (split_heads(x.astype(queries.q.dtype), spec.tiles.k, k_BSKH.shape[2]) for x in (k_BSKH, v_BSKH))
    return Tiles(queries.q, k, v, queries.tokens, _tokens(k_index, spec.tiles.k, 1), queries.slopes)


def split_heads(x_BTNH: jax.Array, block: int, kv_heads: int) -> jax.Array:
    """`[B, T, N, H]` as tiles `[B, K, T/block, G·block, H]`."""
    tiles = fold(x_BTNH, block, Blocks(block, block), kv_heads)
    return tiles.reshape(x_BTNH.shape[0], kv_heads, tiles.shape[1], *tiles.shape[4:])


def split_rows(x_BTN: jax.Array, block: int, kv_heads: int) -> jax.Array:
    """`[B, T, N]` as rows of lanes `[B, K, T/block, 1, G·block]`."""
    return jnp.swapaxes(split_heads(x_BTN[..., None], block, kv_heads), -1, -2)


def join_heads(tiles: jax.Array, block: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split_heads`: tiles back to `shape` = `[B, T, N, H]`."""
    B, K, count, *tile = tiles.shape
    return unfold(tiles.reshape(B * K, count, 1, 1, *tile), block, Blocks(block, block), shape)


def join_rows(tiles: jax.Array, block: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split_rows`: rows of lanes back to `shape` = `[B, T, N]`."""
    return join_heads(jnp.swapaxes(tiles, -1, -2), block, (*shape, 1))[..., 0]


def _blocks_of(index: Index, block: int) -> Index:
    """Index arrays as `[B, T/block, block]`."""
    return jax.tree.map(lambda x: x[:, :, 0], fold_index(index, block, Blocks(block, block), 1))


def _tokens(index: Index, block: int, copies: int) -> jax.Array:
    blocks = _blocks_of(index, block)
    prefix = jnp.zeros_like(blocks.order) if blocks.is_prefix is None else blocks.is_prefix
    fields = jnp.stack([blocks.order, blocks.positions, blocks.segments, prefix], axis=2).astype(jnp.int32)
    return jnp.tile(fields, (1, 1, 1, copies))


def extremes(spec: KernelSpec, q_index: Index, k_index: Index) -> tuple[Bounds, Bounds]:
    """Bounds of the blocks of queries and of keys, `[B, blocks]`."""
    q, k = (
        bounds(jax.tree.map(lambda x: x.reshape(x.shape[0], -1), _blocks_of(index, block)), block)
        for index, block in ((q_index, spec.tiles.q), (k_index, spec.tiles.k))
    )
    return q, k


def pairs(test: Callable[[Mask, Bounds, Bounds], jax.Array], spec: KernelSpec, q: Bounds, k: Bounds, keys_pass: bool) -> jax.Array:
    """`may_see` or `sees_all` of all pairs of blocks, `[B, blocks that stay, blocks that pass]` (`keys_pass`: keys pass)."""
    found = test(spec.mask, jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None, :], k))
    return found if keys_pass else jnp.swapaxes(found, 1, 2)


def flat(extremes: Bounds) -> jax.Array:
    """Bounds `[B, blocks]` as one flat int32 array, for `read`."""
    return jnp.stack([getattr(extremes, name).astype(jnp.int32) for name in BOUNDS]).reshape(-1)


def read(ref, B: int, count: int, b: jax.Array, i: jax.Array) -> Bounds:
    """The bounds of block i of row b, of `count` blocks in each of B rows, inside a kernel."""
    values = {name: ref[(n * B + b) * count + i] for n, name in enumerate(BOUNDS)}
    return Bounds(**{name: x != 0 if name.startswith(("any", "all")) else x for name, x in values.items()})


class QueryResiduals(NamedTuple):
    """What the backward pass needs from the queries, in tiles: the cotangents of o, log-sum-exp, and D (see `row_terms`)."""

    queries: QueryTiles
    do: jax.Array
    lse: jax.Array
    delta: jax.Array


def query_residuals(
    spec: KernelSpec, q_BTNH, q_index, slopes_N, kv_heads: int, whole: Partial, cotangent: Partial
) -> QueryResiduals:
    """Tiles of the queries' side, for any keys."""
    block = spec.tiles.q
    lse, delta = row_terms(whole, cotangent, jnp.float32)
    do = split_heads(cotangent[0].astype(q_BTNH.dtype), block, kv_heads)
    queries = make_query_tiles(spec, q_BTNH, q_index, slopes_N, kv_heads)
    return QueryResiduals(queries, do, split_rows(lse, block, kv_heads), split_rows(delta, block, kv_heads))


def index_of(mask: Mask, fields: list[jax.Array]) -> Index:
    """The index that a mask takes, from arrays in the order of `FIELDS`."""
    return Index(fields[0], fields[1], fields[2], fields[3] if mask.prefix else None)


def logits_of(
    spec: KernelSpec, masked: bool, raw: jax.Array, slopes: jax.Array, indices: Callable[[], tuple[Index, Index]]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A tile of logits from raw = q·k; the logits before bias and mask; and |distance| if there are slopes.

    `indices` returns the index of the queries and that of the keys, broadcast against each other; called only if they matter.
    """
    capped = raw * spec.scale
    if spec.softcap is not None:
        capped = spec.softcap * _tanh(spec, capped / spec.softcap)
    if not (masked or spec.bias is not None):
        return capped, capped, None
    q_index, k_index = indices()
    tile, away = capped, None
    if spec.bias is not None:
        away = jnp.abs(q_index.positions - k_index.positions).astype(jnp.float32)
        tile = tile - slopes * away
    if masked:
        tile = jnp.where(sees(spec.mask, q_index, k_index), tile, MASKED)
    return tile, capped, away


def _tanh(spec: KernelSpec, x: jax.Array) -> jax.Array:
    # A kernel for a GPU with jnp.tanh in it did not finish compiling within minutes (jax 0.11.2, H200).
    return 1.0 - 2.0 / (1.0 + jnp.exp(2.0 * x)) if spec.platform == "gpu" else jnp.tanh(x)


def cotangents_of(
    spec: KernelSpec, p: jax.Array, capped: jax.Array, dp: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of q·k and of the logits, from probabilities, the logits before bias and mask, do·v and D (see `row_terms`)."""
    dlogits = p * (dp - delta)
    ds = dlogits
    if spec.softcap is not None:
        ds = ds * (1.0 - jnp.square(capped / spec.softcap))
    return ds * spec.scale, dlogits


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """a·b over one axis of each, in float32; a float32 product is not rounded to bfloat16 on the way."""
    b = b.astype(a.dtype)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
