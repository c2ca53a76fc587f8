"""Shared by the passes of the TPU kernel, besides `tiling`: the grid, what a step of it sees of the mask, and a tile of logits.

Legend: see `tiling`. A tile of logits is transposed, `[block_k, rows]`: everything that belongs to a query (its log-sum-exp, order
and segment) is then one row of lanes, which takes no extra memory, and a maximum over keys is one over sublanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx.attention.pallas.tiling import FIELDS, Tiles, extremes, flat, index_of, logits_of, pairs, product, read
from lcx.attention.spec import KernelSpec
from lcx.core.batch import Index
from lcx.core.mask import may_see, sees_all

VMEM = 64 * 2**20
"""Bytes of on-chip memory that a kernel may request: half of that of v5e and v6e, all of that of v5p."""


class GridRanges(NamedTuple):
    """What is known before a grid step, as flat int32 arrays in scalar memory: the extremes of every block, and for every block
    that stays, the first and last of the passing blocks that it has work with."""

    q_bounds: jax.Array
    k_bounds: jax.Array
    first: jax.Array
    last: jax.Array


def grid_ranges(spec: KernelSpec, q_index: Index, k_index: Index, keys_pass: bool) -> GridRanges:
    """The scalars of a call in which the blocks of one side stay while the blocks of the other (`keys_pass`: the keys) pass."""
    q, k = extremes(spec, q_index, k_index)
    some = pairs(may_see, spec, q, k, keys_pass)
    count = some.shape[2]
    place = jax.lax.broadcasted_iota(jnp.int32, some.shape, 2)
    first = jnp.min(jnp.where(some, place, count - 1), axis=2)
    last = jnp.max(jnp.where(some, place, 0), axis=2)
    # A block with nothing to do gets a range of one.
    return GridRanges(flat(q), flat(k), jnp.minimum(first, last).reshape(-1), last.reshape(-1))


def visit(spec: KernelSpec, sizes: tuple[int, ...], q_bounds, k_bounds, b, i, j, tile: Callable[[bool], None]) -> None:
    """Runs `tile(masked)` if query block i of row b may see any of key block j; unmasked if it sees all of it."""
    B, _, q_count, k_count = sizes
    q, k = read(q_bounds, B, q_count, b, i), read(k_bounds, B, k_count, b, j)
    whole = sees_all(spec.mask, q, k)

    @pl.when(may_see(spec.mask, q, k))
    def compute():
        jax.lax.cond(whole, lambda: tile(False), lambda: tile(True))


def logits(spec: KernelSpec, masked: bool, q, k, q_tokens, k_tokens, slopes) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A tile `[block_k, rows]` of logits; the logits before bias and mask; and |distance| if there are slopes."""

    def indices() -> tuple[Index, Index]:
        # Broadcast before comparing: the result of a comparison cannot be broadcast over lanes.
        shape, columns = raw.shape, jnp.swapaxes(k_tokens, 0, 1)
        of_q = [jnp.broadcast_to(q_tokens[n : n + 1, :], shape) for n in range(len(FIELDS))]
        of_k = [jnp.broadcast_to(columns[:, n : n + 1], shape) for n in range(len(FIELDS))]
        return index_of(spec.mask, of_q), index_of(spec.mask, of_k)

    raw = product(k, q, 1, 1)
    return logits_of(spec, masked, raw, slopes, indices)


def call(
    kernel: Any,
    spec: KernelSpec,
    name: str,
    tiles: Tiles,
    known: GridRanges,
    keys_pass: bool,
    more: tuple,
    outputs: list,
    scratch: list,
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
            # The same block again if there is nothing to do: it is not fetched twice.
            at = b * stays + i
            return b, h, jnp.minimum(jnp.maximum(j, first[at]), last[at]), 0, 0

        return index

    def block_spec(side: str, x) -> pl.BlockSpec:
        at = block(side)
        if x.ndim == 4:  # the same for all heads
            return pl.BlockSpec((None, None, *x.shape[2:]), lambda *ids: (ids[0], at(*ids)[2], 0, 0))
        return pl.BlockSpec((None, None, None, *x.shape[3:]), at)

    slopes = pl.BlockSpec((None, *tiles.slopes.shape[1:]), lambda b, h, *_: (h, 0, 0))
    sides = [("q", tiles.q), ("k", tiles.k), ("k", tiles.v), ("q", tiles.q_tokens), ("k", tiles.k_tokens)]
    rows, H = tiles.q.shape[3:]
    seen = B * K * q_count * k_count * rows * tiles.k.shape[3]
    moved = sum(x.nbytes for _, x in sides) + sum(x.size * x.dtype.itemsize for _, x in outputs)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(known),
            grid=(B, K, stays, passes),
            in_specs=[block_spec(*x) for x in sides] + [slopes] + [block_spec("q", x) for x in more],
            out_specs=[block_spec(*x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[x for _, x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=4 * seen * H, transcendentals=seen, bytes_accessed=moved),
        interpret=spec.interpret,
        name=name,
    )(*known, *tiles, *more)
