"""What the passes of the TPU kernel share: how arrays are cut, what a grid step sees of the mask, and a tile of logits.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim, `rows` = G·block_q. Queries are cut into
tiles `[B, K, T/block_q, rows, H]`, the G query heads of a KV head below one another, so that keys are never repeated; keys into
tiles `[B, K, S/block_k, block_k, H]`. A tile of logits stands on its side, `[block_k, rows]`: all that belongs to a query (its
log-sum-exp, order and segment) is then one row of lanes, which takes no memory beyond its own, and a maximum over keys is one over
sublanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.attention.dense import MASKED
from lcx.attention.tiles import Blocks, fold, fold_index, unfold
from lcx.core.batch import Index
from lcx.core.mask import Bounds, Mask, bounds, may_see, sees, sees_all

FIELDS = ("order", "positions", "segments", "prefix")
BOUNDS = tuple(field.name for field in dataclasses.fields(Bounds))

VMEM = 64 * 2**20
"""Bytes of on-chip memory that a kernel may ask for: half of what v5e and v6e have, all of it on v5p."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """All that is static about one call. `linear`: ALiBi's slopes are in use. `interpret`: no TPU, run the kernel's jaxpr."""

    mask: Mask
    linear: bool
    scale: float
    softcap: float | None
    blocks: Blocks
    out_dtype: Any
    interpret: bool


class Steps(NamedTuple):
    """What is known before a grid step, as flat int32 arrays in scalar memory: extremes of every block, and for every block that
    stays while the others pass the first and last of those that it has work with."""

    q_bounds: jax.Array
    k_bounds: jax.Array
    first: jax.Array
    last: jax.Array


class Tiles(NamedTuple):
    """The arrays of a call in tiles, and who their tokens are: `[B, T/block_q, 4, rows]` and `[B, S/block_k, 4, block_k]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_tokens: jax.Array
    k_tokens: jax.Array
    slopes: jax.Array

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows of the batch, KV heads, blocks of queries and blocks of keys: the whole grid."""
        return (*self.q.shape[:3], self.k.shape[2])


class QueryTiles(NamedTuple):
    """The queries' side of `Tiles`, and their index as it came."""

    q: jax.Array
    tokens: jax.Array
    slopes: jax.Array
    index: Index


def cut_queries(rule: Rule, q_BTNH: jax.Array, q_index: Index, slopes_N: jax.Array | None, kv_heads: int) -> QueryTiles:
    """Tiles of the queries; tails are zeros of segment 0, so padding."""
    group = q_BTNH.shape[2] // kv_heads
    slopes = jnp.zeros(kv_heads * group, jnp.float32) if slopes_N is None else slopes_N.astype(jnp.float32)
    slopes = jnp.repeat(slopes.reshape(kv_heads, 1, group), rule.blocks.q, axis=2)
    return QueryTiles(cut_heads(q_BTNH, rule.blocks.q, kv_heads), _tokens(q_index, rule.blocks.q, group), slopes, q_index)


def cut(rule: Rule, queries: QueryTiles, k_BSKH: jax.Array, v_BSKH: jax.Array, k_index: Index) -> Tiles:
    """Tiles of the arguments of a kernel."""
    k, v = (cut_heads(x.astype(queries.q.dtype), rule.blocks.k, k_BSKH.shape[2]) for x in (k_BSKH, v_BSKH))
    return Tiles(queries.q, k, v, queries.tokens, _tokens(k_index, rule.blocks.k, 1), queries.slopes)


def cut_heads(x_BTNH: jax.Array, block: int, kv_heads: int) -> jax.Array:
    """`[B, T, N, H]` as tiles `[B, K, T/block, G·block, H]`."""
    tiles = fold(x_BTNH, block, Blocks(block, block), kv_heads)
    return tiles.reshape(x_BTNH.shape[0], kv_heads, tiles.shape[1], *tiles.shape[4:])


def cut_numbers(x_BTN: jax.Array, block: int, kv_heads: int) -> jax.Array:
    """`[B, T, N]` as rows of lanes `[B, K, T/block, 1, G·block]`."""
    return jnp.swapaxes(cut_heads(x_BTN[..., None], block, kv_heads), -1, -2)


def join_heads(tiles: jax.Array, block: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `cut_heads`: tiles back to `shape` = `[B, T, N, H]`."""
    B, K, count, *tile = tiles.shape
    return unfold(tiles.reshape(B * K, count, 1, 1, *tile), block, Blocks(block, block), shape)


def join_numbers(tiles: jax.Array, block: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `cut_numbers`: rows of lanes back to `shape` = `[B, T, N]`."""
    return join_heads(jnp.swapaxes(tiles, -1, -2), block, (*shape, 1))[..., 0]


def _blocks_of(index: Index, block: int) -> Index:
    """Index arrays as `[B, T/block, block]`."""
    return jax.tree.map(lambda x: x[:, :, 0], fold_index(index, block, Blocks(block, block), 1))


def _tokens(index: Index, block: int, copies: int) -> jax.Array:
    blocks = _blocks_of(index, block)
    prefix = jnp.zeros_like(blocks.order) if blocks.prefix is None else blocks.prefix
    fields = jnp.stack([blocks.order, blocks.positions, blocks.segments, prefix], axis=2).astype(jnp.int32)
    return jnp.tile(fields, (1, 1, 1, copies))


def steps(rule: Rule, q_index: Index, k_index: Index, keys_pass: bool) -> Steps:
    """The scalars of a call in which, while a block of the one side stays, the blocks of the other (`keys_pass`: keys) pass."""
    q, k = (
        bounds(jax.tree.map(lambda x: x.reshape(x.shape[0], -1), _blocks_of(index, block)), block)
        for index, block in ((q_index, rule.blocks.q), (k_index, rule.blocks.k))
    )
    some = may_see(rule.mask, jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None, :], k))
    some = some if keys_pass else jnp.swapaxes(some, 1, 2)
    count = some.shape[2]
    place = jax.lax.broadcasted_iota(jnp.int32, some.shape, 2)
    first = jnp.min(jnp.where(some, place, count - 1), axis=2)
    last = jnp.max(jnp.where(some, place, 0), axis=2)
    # A block with nothing to do gets a range of one.
    return Steps(_flat(q), _flat(k), jnp.minimum(first, last).reshape(-1), last.reshape(-1))


def _flat(extremes: Bounds) -> jax.Array:
    return jnp.stack([getattr(extremes, name).astype(jnp.int32) for name in BOUNDS]).reshape(-1)


def visit(rule: Rule, sizes: tuple[int, ...], q_bounds, k_bounds, b, i, j, tile: Callable[[bool], None]) -> None:
    """Runs `tile(masked)` where query block i of row b may see any of key block j; unmasked where it sees all."""
    B, _, q_count, k_count = sizes
    q, k = _read(q_bounds, B, q_count, b, i), _read(k_bounds, B, k_count, b, j)
    whole = sees_all(rule.mask, q, k)

    @pl.when(may_see(rule.mask, q, k))
    def _():
        jax.lax.cond(whole, lambda: tile(False), lambda: tile(True))


def _read(ref, B: int, count: int, b: jax.Array, i: jax.Array) -> Bounds:
    values = {name: ref[(n * B + b) * count + i] for n, name in enumerate(BOUNDS)}
    return Bounds(**{name: x != 0 if name.startswith(("any", "all")) else x for name, x in values.items()})


def logits(rule: Rule, masked: bool, q, k, q_tokens, k_tokens, slopes) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A tile `[block_k, rows]` of logits; the same before bias and mask; and |distance| where there are slopes."""
    capped = product(k, q, 1, 1) * rule.scale
    if rule.softcap is not None:
        capped = rule.softcap * jnp.tanh(capped / rule.softcap)
    if not (masked or rule.linear):
        return capped, capped, None
    shape = capped.shape
    # Spread before they are compared: a comparison's result can't be spread over lanes.
    q_index = _index(rule.mask, [jnp.broadcast_to(q_tokens[n : n + 1, :], shape) for n in range(len(FIELDS))])
    columns = jnp.swapaxes(k_tokens, 0, 1)
    k_index = _index(rule.mask, [jnp.broadcast_to(columns[:, n : n + 1], shape) for n in range(len(FIELDS))])
    tile, away = capped, None
    if rule.linear:
        away = jnp.abs(q_index.positions - k_index.positions).astype(jnp.float32)
        tile = tile - slopes * away
    if masked:
        tile = jnp.where(sees(rule.mask, q_index, k_index), tile, MASKED)
    return tile, capped, away


def _index(mask: Mask, fields: list[jax.Array]) -> Index:
    return Index(*fields[:3], fields[3] if mask.prefix else None)


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """a·b over one axis of each, in float32; a float32 product is not rounded to bfloat16 on the way."""
    b = b.astype(a.dtype)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def call(
    kernel: Any, rule: Rule, name: str, tiles: Tiles, known: Steps, keys_pass: bool, more: tuple, outputs: list, scratch: list
) -> list:
    """Runs `kernel` over the grid (b, h, block that stays, block that passes).

    `more` are further tiles on the queries' side, `outputs` pairs of (side, shape of the whole) with side "q" or "k".
    """
    B, K, q_count, k_count = tiles.sizes
    stays, passes = (q_count, k_count) if keys_pass else (k_count, q_count)

    def block(side: str):
        def index(b, h, i, j, q_bounds, k_bounds, first, last):
            if (side == "k") != keys_pass:
                return b, h, i, 0, 0
            # The same block again where there is nothing to do: it is not fetched twice.
            at = b * stays + i
            return b, h, jnp.minimum(jnp.maximum(j, first[at]), last[at]), 0, 0

        return index

    def spec(side: str, x) -> pl.BlockSpec:
        at = block(side)
        if x.ndim == 4:  # the same for all heads
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda *ids: (ids[0], at(*ids)[2], 0, 0))
        return pl.BlockSpec((None, None, None, *x.shape[3:]), at)

    slopes = pl.BlockSpec((None, *tiles.slopes.shape[1:]), lambda b, h, *_: (h, 0, 0))
    sides = [("q", tiles.q), ("k", tiles.k), ("k", tiles.v), ("q", tiles.q_tokens), ("k", tiles.k_tokens)]
    rows, H = tiles.q.shape[3:]
    pairs = B * K * q_count * k_count * rows * tiles.k.shape[3]
    moved = sum(x.nbytes for _, x in sides) + sum(x.size * x.dtype.itemsize for _, x in outputs)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(B, K, stays, passes),
            in_specs=[spec(*x) for x in sides] + [slopes] + [spec("q", x) for x in more],
            out_specs=[spec(*x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[x for _, x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=4 * pairs * H, transcendentals=pairs, bytes_accessed=moved),
        interpret=rule.interpret,
        name=name,
    )(*known, *tiles, *more)
