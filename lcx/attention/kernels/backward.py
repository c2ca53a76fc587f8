"""The backward pass of the TPU kernel: one kernel for dq, past which keys pass, and one for dk and dv, past which queries pass.

Tiles of probabilities are computed again from q, k and the log-sum-exp (arXiv 2307.08691). Legend: see `grid`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcx.attention.dense import MASKED
from lcx.attention.kernels import grid
from lcx.attention.kernels.grid import Rule
from lcx.attention.merge import Partial


def backward(
    rule: Rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes_N, whole: Partial, cotangent: Partial, beside: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    """float32 `(dq, dk, dv, dslopes)` that go through these keys, and `beside`; dslopes `[N]` is 0 without slopes."""
    (o, lse), (do, dlse) = whole, cotangent
    tiles = grid.cut(rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes_N)
    block, K = rule.blocks.q, k_BSKH.shape[2]
    # d logits = p · (dp − D) with D = rowsum(do · o) − dlse; a row that saw nothing gets p = exp(−huge) = 0.
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    lse = jnp.where(jnp.isneginf(lse), -MASKED, lse)
    more = (grid.cut_heads(do.astype(q_BTNH.dtype), block, K), grid.cut_numbers(lse, block, K), grid.cut_numbers(delta, block, K))

    def like(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)

    rows, H = tiles.q.shape[3:]
    dq, dslopes = grid.call(
        functools.partial(_queries, rule, tiles.sizes), rule, "flash_backward_queries", tiles,
        grid.steps(rule, q_index, k_index, keys_pass=True), True, more,
        [("q", like(tiles.q)), ("q", like(more[1]))], [(H, rows), (1, rows)],
    )  # fmt: skip
    dk, dv = grid.call(
        functools.partial(_keys, rule, tiles.sizes), rule, "flash_backward_keys", tiles,
        grid.steps(rule, q_index, k_index, keys_pass=False), False, more,
        [("k", like(tiles.k)), ("k", like(tiles.v))], [tiles.k.shape[3:], tiles.k.shape[3:]],
    )  # fmt: skip
    # Before anything else is done with the results, which the compiler could hide transfers behind instead of behind the kernel.
    # Not for dq too: its kernel then runs when what has arrived is added up, and fewer results are held at a time.
    (dk, dv), beside = jax.lax.optimization_barrier(((dk, dv), beside))
    dk, dv = (grid.join_heads(x, rule.blocks.k, k_BSKH.shape) for x in (dk, dv))
    dslopes = jnp.sum(grid.join_numbers(dslopes, block, q_BTNH.shape[:3]), axis=(0, 1))
    return (grid.join_heads(dq, block, q_BTNH.shape), dk, dv, dslopes), beside


def _slope(rule: Rule, masked: bool, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta) -> tuple:
    """Tiles `[block_k, rows]`: probabilities, cotangents of q·k and of the logits, and |distance| where there are slopes."""
    scores, capped, away = grid.logits(rule, masked, q[...], k[...], q_tokens[...], k_tokens[...], slopes[...])
    p = jnp.exp(scores - lse[...])
    dlogits = p * (grid.product(v[...], do[...], 1, 1) - delta[...])
    ds = dlogits
    if rule.softcap is not None:
        ds = ds * (1.0 - jnp.square(capped / rule.softcap))
    return p, ds * rule.scale, dlogits, away


def _queries(
    rule, sizes, q_bounds, k_bounds, first, last, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta, dq, dslopes, acc, slope_acc
):  # fmt: skip
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        slope_acc[...] = jnp.zeros(slope_acc.shape, jnp.float32)

    def tile(masked: bool) -> None:
        _, ds, dlogits, away = _slope(rule, masked, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta)
        acc[...] += grid.product(k[...], ds, 0, 0)
        if rule.linear:
            slope_acc[...] -= jnp.sum(dlogits * away, axis=0, keepdims=True)

    some, whole = grid.work(rule, sizes, q_bounds, k_bounds, b, i, j)

    @pl.when(some)
    def _():
        jax.lax.cond(whole, lambda: tile(False), lambda: tile(True))

    @pl.when(j == sizes[3] - 1)
    def _():
        dq[...] = jnp.swapaxes(acc[...], 0, 1)
        dslopes[...] = slope_acc[...]


def _keys(
    rule, sizes, q_bounds, k_bounds, first, last, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta, dk, dv, dk_acc, dv_acc
):  # fmt: skip
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def tile(masked: bool) -> None:
        p, ds, _, _ = _slope(rule, masked, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta)
        dv_acc[...] += grid.product(p.astype(do.dtype), do[...], 1, 0)
        dk_acc[...] += grid.product(ds.astype(q.dtype), q[...], 1, 0)

    some, whole = grid.work(rule, sizes, q_bounds, k_bounds, b, i, j)

    @pl.when(some)
    def _():
        jax.lax.cond(whole, lambda: tile(False), lambda: tile(True))

    @pl.when(i == sizes[2] - 1)
    def _():
        dk[...] = dk_acc[...]
        dv[...] = dv_acc[...]
