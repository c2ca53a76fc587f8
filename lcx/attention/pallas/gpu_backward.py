"""The backward pass of the GPU kernel: one kernel for dq, which loops over keys, and one for dk and dv, which loops over queries.

Tiles of probabilities are recomputed from q, k and the log-sum-exp (arXiv 2307.08691). Legend: see `gpu_walk`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcx.attention.pallas import gpu_walk as gpu
from lcx.attention.pallas import tiling
from lcx.attention.pallas.tiling import QueryResiduals
from lcx.attention.partial import Partial, with_barrier
from lcx.attention.spec import KernelSpec


def query_residuals(spec: KernelSpec, q_BTNH, q_index, slopes_N, whole: Partial, cotangent: Partial) -> QueryResiduals:
    """Tiles of the queries' side, for any keys."""
    return gpu.widen_queries(tiling.query_residuals(spec, q_BTNH, q_index, slopes_N, q_BTNH.shape[2], whole, cotangent))


def backward(
    spec: KernelSpec, residuals: QueryResiduals, k_BSKH, v_BSKH, k_index, in_flight: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    """float32 gradients `(dq, dk, dv, dslopes)` through these keys, dq in tiles, dslopes `[N]`; and `in_flight` unchanged."""
    queries, *more = residuals
    tiles, q_index = gpu.make_wide_tiles(spec, queries, k_BSKH, v_BSKH, k_index), queries.index
    counts = (tiles.q.shape[0], tiles.q.shape[2], tiles.k.shape[2])

    def run(kernel, name: str, keys_pass: bool, like: tuple[jax.Array, ...]) -> list:
        outputs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in like]
        known = gpu.tile_ranges(spec, q_index, k_index, keys_pass)
        return gpu.call(functools.partial(kernel, spec, counts), spec, name, tiles, known, keys_pass, tuple(more), outputs)

    dq, *dslopes = run(_queries, "flash_backward_queries", True, (tiles.q, residuals.lse) if spec.bias is not None else (tiles.q,))
    dk, dv = run(_keys, "flash_backward_keys", False, (tiles.k, tiles.v))
    dk, dv = (tiling.join_heads(x[..., : k_BSKH.shape[3]], spec.tiles.k, k_BSKH.shape) for x in (dk, dv))
    # Rows beyond the last token have probabilities of 0.
    dslopes = jnp.sum(dslopes[0], axis=(0, 2, 3, 4)) if spec.bias is not None else jnp.zeros(tiles.slopes.shape, jnp.float32)
    return with_barrier((dq, dk, dv, dslopes), in_flight)


def _slope(spec: KernelSpec, masked: bool, q_axis: int, q, k, v, q_tokens, k_tokens, slope, do, lse, delta) -> tuple:
    """Tiles, queries along `q_axis`: probabilities, cotangents of q·k and of the logits, and |distance| if there are slopes."""
    scores, capped, away = gpu.logits(spec, masked, q_axis, q, k, q_tokens, k_tokens, slope)
    p = jnp.exp(scores - gpu.spread(lse, q_axis))
    dp = tiling.product(do, v, 1, 1) if q_axis == 0 else tiling.product(v, do, 1, 1)
    ds, dlogits = tiling.cotangents_of(spec, p, capped, dp, gpu.spread(delta, q_axis))
    return p, ds, dlogits, away


def _queries(spec, counts, *refs):
    *known, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta = refs[:15]
    outputs = refs[15:]  # dq, and dslopes if there are slopes
    i, n, b = (pl.program_id(axis) for axis in range(3))
    here, asking, fixed = q[...], gpu.tokens(q_tokens), (slopes[n], do[...], lse[0, :], delta[0, :])

    def tile(masked: bool, j, carry):
        acc, *slope_acc = carry
        key = k[j]
        _, ds, dlogits, away = _slope(spec, masked, 0, here, key, v[j], asking, gpu.tokens(k_tokens, j), *fixed)
        slope_acc = [x - jnp.sum(dlogits * away, axis=1) for x in slope_acc]
        return acc + tiling.product(ds.astype(key.dtype), key, 1, 0), *slope_acc

    start = jnp.zeros(q.shape, jnp.float32), *(jnp.zeros(q.shape[:1], jnp.float32) for _ in outputs[1:])
    acc, *slope_acc = gpu.visit_tiles(spec, known, counts, b, i, True, tile, start)
    outputs[0][...] = acc
    for ref, x in zip(outputs[1:], slope_acc, strict=True):
        ref[0, :] = x


def _keys(spec, counts, *refs):
    *known, q, k, v, q_tokens, k_tokens, slopes, do, lse, delta, dk, dv = refs
    j, h, b = (pl.program_id(axis) for axis in range(3))
    key, value, asked, group = k[...], v[...], gpu.tokens(k_tokens), q.shape[0]

    def head(g, carry):
        slope = slopes[h * group + g]

        def tile(masked: bool, i, carry):
            dk_acc, dv_acc = carry
            query, cotangent = q[g, i], do[g, i]
            fixed = (slope, cotangent, lse[g, i, 0, :], delta[g, i, 0, :])
            p, ds, _, _ = _slope(spec, masked, 1, query, key, value, gpu.tokens(q_tokens, i), asked, *fixed)
            dv_acc = dv_acc + tiling.product(p.astype(cotangent.dtype), cotangent, 1, 0)
            return dk_acc + tiling.product(ds.astype(query.dtype), query, 1, 0), dv_acc

        return gpu.visit_tiles(spec, known, counts, b, j, False, tile, carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk[...], dv[...] = jax.lax.fori_loop(0, group, head, start)
