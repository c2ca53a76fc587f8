"""Attention of single queries over a cache, for CPUs: keys and values are read once, in their stored layout.

The keys of all heads are one matrix `[S, K·H]`, and queries get zeros in the places of other heads, so that each row takes two
plain products, at the price of K times the multiplications, which are few for one query. Products per head would need transposed
keys and values, and XLA's CPU backend copies them for that, which takes four to eight times as long.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.dense import weigh
from lcx.attention.partial import Partial
from lcx.attention.spec import KernelSpec
from lcx.core.batch import Index


def flat(
    spec: KernelSpec, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, q_index: Index, k_index: Index, bias_params: Any
) -> Partial:
    """The same function as `dense`, with B·T·N·S logits in memory."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    own = jnp.eye(K, dtype=q_BTNH.dtype)
    spread = q_BTNH.reshape(B, T, K, N // K, 1, H) * own.reshape(1, 1, K, 1, K, 1)
    turned = spread.reshape(B, T * N, K * H).swapaxes(1, 2)
    raw = jnp.matmul(k_BSKH.reshape(B, S, K * H), turned, preferred_element_type=wide)
    logits = raw.reshape(B, S, T, N).transpose(0, 3, 2, 1) * spec.scale
    weights, lse = weigh(spec, logits, q_index, k_index, bias_params)
    rows = weights.transpose(0, 2, 1, 3).reshape(B, T * N, S)
    chosen = spec.tile_dtype or wide
    o = jnp.matmul(rows.astype(chosen), v_BSKH.reshape(B, S, K * H).astype(chosen), preferred_element_type=wide)
    o = o.reshape(B, T, K, N // K, K, H)
    o = jnp.sum(o * own.astype(wide).reshape(1, 1, K, 1, K, 1), axis=4).reshape(B, T, N, H)
    return o.astype(spec.out_dtype or q_BTNH.dtype), lse
