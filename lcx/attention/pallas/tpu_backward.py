"""The backward pass of the TPU kernel: one kernel for dq, which loops over keys, and one for dk and dv, which loops over queries.

Tiles of probabilities are recomputed from q, k and the log-sum-exp (arXiv 2307.08691). Legend: see `tiling`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcx.attention.pallas import tiling
from lcx.attention.pallas import tpu_grid as grid
from lcx.attention.pallas.tiling import QueryResiduals
from lcx.attention.spec import KernelSpec


def backward(
    spec: KernelSpec, residuals: QueryResiduals, k_BSKH, v_BSKH, k_index, in_flight: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    """float32 gradients `(dq, dk, dv, dslopes)` through these keys, dq in tiles, dslopes `[N]`; and `in_flight` unchanged."""
    queries, *more = residuals
    tiles, q_index, block = tiling.make_tiles(spec, queries, k_BSKH, v_BSKH, k_index), queries.index, spec.tiles.q

    def like(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)

    rows, H = tiles.q.shape[3:]
    dq, dslopes = grid.call(
        functools.partial(_queries, spec, tiles.sizes), spec, "flash_backward_queries", tiles,
        grid.grid_ranges(spec, q_index, k_index, keys_pass=True), True, tuple(more),
        [("q", like(tiles.q)), ("q", like(residuals.lse))], [(H, rows), (1, rows)],
    )  # fmt: skip
    dk, dv = grid.call(
        functools.partial(_keys, spec, tiles.sizes), spec, "flash_backward_keys", tiles,
        grid.grid_ranges(spec, q_index, k_index, keys_pass=False), False, tuple(more),
        [("k", like(tiles.k)), ("k", like(tiles.v))], [tiles.k.shape[3:], tiles.k.shape[3:]],
    )  # fmt: skip
    if in_flight:
        # Before the results are used in any way: otherwise the compiler would hide transfers behind that instead of behind the
        # kernel. What is not needed so soon is left to hide behind the kernel for dq, which runs later.
        (dk, dv), soon = jax.lax.optimization_barrier(((dk, dv), in_flight[0]))
        in_flight = (soon, *in_flight[1:])
    dk, dv = (tiling.join_heads(x, spec.tiles.k, k_BSKH.shape) for x in (dk, dv))
    B, T = q_index.order.shape
    dslopes = jnp.sum(tiling.join_rows(dslopes, block, (B, T, k_BSKH.shape[2] * rows // block)), axis=(0, 1))
    return (dq, dk, dv, dslopes), in_flight


def _slope(spec: KernelSpec, masked: bool, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta) -> tuple:
    """Tiles `[block_k, rows]`: probabilities, cotangents of q·k and of the logits, and |distance| if there are slopes."""
    scores, capped, away = grid.logits(spec, masked, q[...], k[...], q_tokens[...], k_tokens[...], slopes[...])
    p = jnp.exp(scores - lse[...])
    ds, dlogits = tiling.cotangents_of(spec, p, capped, tiling.product(v[...], do[...], 1, 1), delta[...])
    return p, ds, dlogits, away


def _queries(
    spec, sizes, q_bounds, k_bounds, first, last, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta, dq, dslopes, acc, slope_acc
):  # fmt: skip
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        slope_acc[...] = jnp.zeros(slope_acc.shape, jnp.float32)

    def tile(masked: bool) -> None:
        _, ds, dlogits, away = _slope(spec, masked, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta)
        acc[...] += tiling.product(k[...], ds, 0, 0)
        if spec.bias is not None:
            slope_acc[...] -= jnp.sum(dlogits * away, axis=0, keepdims=True)

    grid.visit(spec, sizes, q_bounds, k_bounds, b, i, j, tile)

    @pl.when(j == sizes[3] - 1)
    def _():
        dq[...] = jnp.swapaxes(acc[...], 0, 1)
        dslopes[...] = slope_acc[...]


def _keys(
    spec, sizes, q_bounds, k_bounds, first, last, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta, dk, dv, dk_acc, dv_acc
):  # fmt: skip
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def tile(masked: bool) -> None:
        p, ds, _, _ = _slope(spec, masked, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta)
        dv_acc[...] += tiling.product(p.astype(do.dtype), do[...], 1, 0)
        dk_acc[...] += tiling.product(ds.astype(q.dtype), q[...], 1, 0)

    grid.visit(spec, sizes, q_bounds, k_bounds, b, i, j, tile)

    @pl.when(i == sizes[2] - 1)
    def _():
        dk[...] = dk_acc[...]
        dv[...] = dv_acc[...]
