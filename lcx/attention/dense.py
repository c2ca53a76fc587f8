"""The reference implementation (oracle): attention as in the formula, with the whole T×S array in memory.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx.core.batch import Index
from lcx.core.mask import Mask, visible

MASKED = -1e30
"""Used instead of minus infinity where the difference of two such values must not be NaN."""


def dense(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    mask: Mask,
    *,
    bias: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None,
    bias_params: Any = None,
    scale: float,
    softcap: float | None = None,
    out_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of one chunk of queries over one chunk of keys, differentiated by JAX itself.

    logits = cap(scale · q·k) + bias, cap(x) = softcap · tanh(x / softcap), in float32 or wider. Returns `o_BTNH` (`out_dtype`,
    default q's) and float32 `lse_BTN`. Head n reads KV head n // G. A query that sees nothing has o = 0 and lse = -inf, and
    passes on no gradient. `bias(bias_params, q_positions, k_positions)` is float32 `[B, N, T, S]`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q = q_BTNH.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=wide).reshape(B, N, T, S) * scale
    weights, lse = weigh(logits, q_index, k_index, mask, bias, bias_params, softcap)
    probabilities = weights.reshape(B, K, N // K, T, S)
    o = jnp.einsum("bkgts,bskh->btkgh", probabilities, v_BSKH.astype(wide)).reshape(B, T, N, H)
    return o.astype(out_dtype or q_BTNH.dtype), lse


def weigh(
    logits: jax.Array,
    q_index: Index,
    k_index: Index,
    mask: Mask,
    bias: Callable[[Any, jax.Array, jax.Array], jax.Array] | None,
    bias_params: Any,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax weights `[B, N, T, S]` and `lse_BTN` of scaled logits `[B, N, T, S]`; applies softcap, bias and mask."""
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits += bias(bias_params, q_index.positions, k_index.positions)
    seen = visible(mask, q_index, k_index)[:, None]
    logits = jnp.where(seen, logits, MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return weights / total, jnp.swapaxes(lse, 1, 2)
