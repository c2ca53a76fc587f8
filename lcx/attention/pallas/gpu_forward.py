"""The forward pass of the GPU kernel: an online softmax, looping over keys for each block of queries (arXiv 2307.08691).

Legend: see `gpu_walk`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcx.attention.dense import MASKED
from lcx.attention.pallas import gpu_walk as gpu
from lcx.attention.pallas import tiling
from lcx.attention.partial import Partial
from lcx.attention.spec import KernelSpec


def forward(spec: KernelSpec, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes_N) -> Partial:
    """`(o_BTNH, lse_BTN)` of the queries over these keys."""
    *_, N, H = q_BTNH.shape
    tiles = gpu.make_wide_tiles(spec, tiling.make_query_tiles(spec, q_BTNH, q_index, slopes_N, N), k_BSKH, v_BSKH, k_index)
    known = gpu.tile_ranges(spec, q_index, k_index, keys_pass=True)
    block = tiles.q.shape[3]
    outputs = [
        jax.ShapeDtypeStruct(tiles.q.shape, spec.out_dtype or q_BTNH.dtype),
        jax.ShapeDtypeStruct((*tiles.q.shape[:3], 1, block), jnp.float32),
    ]
    kernel = functools.partial(_kernel, spec, (tiles.q.shape[0], tiles.q.shape[2], tiles.k.shape[2]))
    o, lse = gpu.call(kernel, spec, "flash_forward", tiles, known, True, (), outputs)
    return tiling.join_heads(o[..., :H], block, q_BTNH.shape), tiling.join_rows(lse, block, q_BTNH.shape[:3])


def _kernel(spec, counts, *refs):
    *known, q, k, v, q_tokens, k_tokens, slopes, o, lse = refs
    i, n, b = (pl.program_id(axis) for axis in range(3))
    rows, H = q.shape
    here, asking, slope = q[...], gpu.tokens(q_tokens), slopes[n]

    def tile(masked: bool, j, carry):
        top, total, acc = carry
        scores, _, _ = gpu.logits(spec, masked, 0, here, k[j], asking, gpu.tokens(k_tokens, j), slope)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # A row without a visible key so far has new_top = MASKED; halving it keeps exp(MASKED - ...) at 0 there.
        safe = jnp.maximum(new_top, MASKED / 2)
        p = jnp.exp(scores - safe[:, None])
        shrink = jnp.exp(top - safe)
        acc = acc * shrink[:, None] + tiling.product(p.astype(v.dtype), v[j], 1, 0)
        return new_top, total * shrink + jnp.sum(p, axis=1), acc

    start = jnp.full((rows,), MASKED, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, H), jnp.float32)
    top, total, acc = gpu.visit_tiles(spec, known, counts, b, i, True, tile, start)
    empty = total == 0.0
    share = jnp.where(empty, 1.0, total)
    o[...] = (acc / share[:, None]).astype(o.dtype)
    lse[0, :] = jnp.where(empty, -jnp.inf, top + jnp.log(share))
