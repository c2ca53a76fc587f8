"""Shared by the passes of the GPU kernel, besides `tiling`: a program's loop over the tiles that pass it, and a tile of logits.

Legend: see `tiling`, but with every query head by itself: query tiles `[B, N, T/block_q, block_q, H]`. A program owns one tile
and loops over all that pass, so that no two programs add to the same result, and results are the same in every run. Triton
needs tile sides that are powers of two: heads are zero-padded to `width(H)`, and `attention.plan` chooses suitable block sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcx.attention.pallas.tiling import (
    FIELDS,
    QueryResiduals,
    Tiles,
    extremes,
    flat,
    index_of,
    logits_of,
    make_tiles,
    pairs,
    product,
    read,
)
from lcx.attention.spec import KernelSpec
from lcx.core.batch import Index
from lcx.core.mask import may_see, sees_all


class TileRanges(NamedTuple):
    """What is known about the tiles before the programs start, as flat int32 arrays.

    The extremes of every block; and for every block that stays, which blocks pass: it sees none before `first`, none from `stop`
    on, and all of every block from `start` up to `end`.
    """

    q_bounds: jax.Array
    k_bounds: jax.Array
    first: jax.Array
    start: jax.Array
    end: jax.Array
    stop: jax.Array


def tile_ranges(spec: KernelSpec, q_index: Index, k_index: Index, keys_pass: bool) -> TileRanges:
    """The walks of a call in which the blocks of one side stay while the blocks of the other (`keys_pass`: the keys) pass."""
    q, k = extremes(spec, q_index, k_index)
    some = pairs(may_see, spec, q, k, keys_pass)
    whole = pairs(sees_all, spec, q, k, keys_pass) & some
    place = jax.lax.broadcasted_iota(jnp.int32, some.shape, 2)
    first = jnp.min(jnp.where(some, place, some.shape[2]), axis=2)
    stop = jnp.max(jnp.where(some, place + 1, 0), axis=2)
    first = jnp.minimum(first, stop)
    # Of the fully visible blocks, the last ones without a gap: only reductions, since an array of all pairs must never be stored.
    end = jnp.maximum(first, jnp.max(jnp.where(whole, place + 1, 0), axis=2))
    gap = ~whole & (place < end[..., None])
    start = jnp.minimum(end, jnp.maximum(first, jnp.max(jnp.where(gap, place + 1, 0), axis=2)))
    return TileRanges(flat(q), flat(k), *(x.reshape(-1) for x in (first, start, end, stop)))


def visit_tiles(
    spec: KernelSpec, known: Sequence, counts: tuple[int, int, int], b, i, keys_pass: bool, tile: Callable, carry: Any
) -> Any:
    """`tile(masked, j, carry)` over the blocks j that pass block i of row b; `counts`: rows, blocks of queries and of keys.

    Fully visible blocks come first, in a loop without a branch, whose loads Triton moves ahead of the products.
    """
    B, q_count, k_count = counts
    q_bounds, k_bounds, *ends = known
    stays, passes = ((q_bounds, q_count), (k_bounds, k_count)) if keys_pass else ((k_bounds, k_count), (q_bounds, q_count))
    own, at = read(stays[0], B, stays[1], b, i), b * stays[1] + i
    first, start, end, stop = (ref[at] for ref in ends)
    carry = jax.lax.fori_loop(start, end, lambda j, c: tile(False, j, c), carry)

    def partly(n: jax.Array, carry: Any) -> Any:
        j = jnp.where(n < start, n, n + (end - start))
        other = read(passes[0], B, passes[1], b, j)
        seen = may_see(spec.mask, *((own, other) if keys_pass else (other, own)))
        return jax.lax.cond(seen, lambda c: tile(True, j, c), lambda c: c, carry)

    return jax.lax.fori_loop(first, stop - (end - start), partly, carry)


def logits(
    spec: KernelSpec, masked: bool, q_axis: int, q, k, q_tokens, k_tokens, slope
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A tile of logits, queries along `q_axis`; the logits before bias and mask; and |distance| if there are slopes.

    `q_tokens` and `k_tokens` hold a vector for each of `FIELDS`.
    """

    def indices() -> tuple[Index, Index]:
        of_q, of_k = [spread(x, q_axis) for x in q_tokens], [spread(x, 1 - q_axis) for x in k_tokens]
        return index_of(spec.mask, of_q), index_of(spec.mask, of_k)

    raw = product(q, k, 1, 1) if q_axis == 0 else product(k, q, 1, 1)
    return logits_of(spec, masked, raw, slope, indices)


def spread(x: jax.Array, axis: int) -> jax.Array:
    """A vector placed along an axis of a tile."""
    return x[:, None] if axis == 0 else x[None, :]


def tokens(ref: Any, *at: Any) -> list[jax.Array]:
    """The vectors of `FIELDS` of one block."""
    return [ref[(*at, n, slice(None))] for n in range(len(FIELDS))]


def width(H: int) -> int:
    """The head dim in tiles: a power of two, at least 16, which a product requires."""
    return max(16, 1 << (H - 1).bit_length())


def widen(x: jax.Array) -> jax.Array:
    """Pads the head dim of tiles with zeros to `width`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width(x.shape[-1]) - x.shape[-1])])


def widen_queries(residuals: QueryResiduals) -> QueryResiduals:
    """`QueryResiduals` with the heads of q and do padded to `width`."""
    return residuals._replace(queries=residuals.queries._replace(q=widen(residuals.queries.q)), do=widen(residuals.do))


def make_wide_tiles(spec: KernelSpec, queries: Any, k_BSKH: jax.Array, v_BSKH: jax.Array, k_index: Index) -> Tiles:
    """`make_tiles`, with heads padded to `width` and one slope per head."""
    tiles = make_tiles(spec, queries, k_BSKH, v_BSKH, k_index)
    return tiles._replace(q=widen(tiles.q), k=widen(tiles.k), v=widen(tiles.v), slopes=tiles.slopes[:, 0, 0])


def call(
    kernel: Any,
    spec: KernelSpec,
    name: str,
    tiles: Tiles,
    known: TileRanges,
    keys_pass: bool,
    more: tuple,
    outputs: list[jax.ShapeDtypeStruct],
) -> list:
    """Runs `kernel` over the grid (block that stays, head of those that stay, row of the batch).

    `more` are further tiles on the queries' side, `outputs` the shapes of whole outputs, in tiles of the side that stays.
    """
    B, N, q_count = tiles.q.shape[:3]
    K, k_count = tiles.k.shape[1:3]
    group = N // K

    def whole(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda i, h, b: (0,) * x.ndim)

    def here(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:  # the same for all heads
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, b: (b, i, 0, 0))
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda i, h, b: (b, h, i, 0, 0))

    def passing(x: jax.Array) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (b, 0, 0, 0))
        if keys_pass:
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, b: (b, h // group, 0, 0, 0))
        return pl.BlockSpec((None, group, *x.shape[2:]), lambda i, h, b: (b, h, 0, 0, 0))

    options = {}
    if not spec.interpret:
        # Only here: jaxlib does not have Triton's dialect on every system.
        from jax.experimental.pallas import triton

        # On an H200 eight warps halve the speed of heads of 128 (benchmarks/results/h200.json).
        options["compiler_params"] = triton.CompilerParams(num_warps=4 if tiles.q.shape[-1] <= 128 else 8, num_stages=2)
    q_side, k_side = (here, passing) if keys_pass else (passing, here)
    specs = [q_side(tiles.q), k_side(tiles.k), k_side(tiles.v), q_side(tiles.q_tokens), k_side(tiles.k_tokens)]
    return pl.pallas_call(
        kernel,
        grid=(q_count, N, B) if keys_pass else (k_count, K, B),
        in_specs=[whole(x) for x in known] + specs + [whole(tiles.slopes)] + [q_side(x) for x in more],
        out_specs=[here(x) for x in outputs],
        out_shape=outputs,
        interpret=spec.interpret,
        name=name,
        **options,
    )(*known, *tiles, *more)
