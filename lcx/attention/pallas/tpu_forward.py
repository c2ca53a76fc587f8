"""The forward pass of the TPU kernel: an online softmax, looping over keys for each block of queries (arXiv 2307.08691).

Legend: see `tiling`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcx.attention.dense import MASKED
from lcx.attention.pallas import tiling
from lcx.attention.pallas import tpu_grid as grid
from lcx.attention.partial import Partial
from lcx.attention.spec import KernelSpec


def forward(spec: KernelSpec, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes_N) -> Partial:
    """`(o_BTNH, lse_BTN)` of the queries over these keys."""
    tiles = tiling.make_tiles(
        spec, tiling.make_query_tiles(spec, q_BTNH, q_index, slopes_N, k_BSKH.shape[2]), k_BSKH, v_BSKH, k_index
    )
    known = grid.grid_ranges(spec, q_index, k_index, keys_pass=True)
    rows, H = tiles.q.shape[3:]
    outputs = [
        ("q", jax.ShapeDtypeStruct(tiles.q.shape, spec.out_dtype or q_BTNH.dtype)),
        ("q", jax.ShapeDtypeStruct((*tiles.q.shape[:3], 1, rows), jnp.float32)),
    ]
    kernel = functools.partial(_kernel, spec, tiles.sizes)
    o, lse = grid.call(kernel, spec, "flash_forward", tiles, known, True, (), outputs, [(1, rows), (1, rows), (H, rows)])
    return tiling.join_heads(o, spec.tiles.q, q_BTNH.shape), tiling.join_rows(lse, spec.tiles.q, q_BTNH.shape[:3])


def _kernel(
    spec, sizes, q_bounds, k_bounds, first, last, q, k, v, q_tokens, k_tokens, slopes, o, lse, top, total, acc
):  # fmt: skip
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def tile(masked: bool) -> None:
        scores, _, _ = grid.logits(spec, masked, q[...], k[...], q_tokens[...], k_tokens[...], slopes[...])
        new_top = jnp.maximum(top[...], jnp.max(scores, axis=0, keepdims=True))
        # A row without a visible key so far has new_top = MASKED; halving it keeps exp(MASKED - ...) at 0 there.
        safe = jnp.maximum(new_top, MASKED / 2)
        p = jnp.exp(scores - safe)
        shrink = jnp.exp(top[...] - safe)
        top[...] = new_top
        total[...] = total[...] * shrink + jnp.sum(p, axis=0, keepdims=True)
        acc[...] = acc[...] * shrink + tiling.product(v[...], p, 0, 0)

    grid.visit(spec, sizes, q_bounds, k_bounds, b, i, j, tile)

    @pl.when(j == sizes[3] - 1)
    def _():
        empty = total[...] == 0.0
        share = jnp.where(empty, 1.0, total[...])
        o[...] = jnp.swapaxes(acc[...] / share, 0, 1).astype(o.dtype)
        lse[...] = jnp.where(empty, -jnp.inf, top[...] + jnp.log(share))
