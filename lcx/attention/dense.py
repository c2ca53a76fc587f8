"""The reference implementation (oracle): attention as in the formula, with the whole T×S array in memory.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.partial import AttentionVjp, Partial, to_fp32, with_barrier, zeros_fp32
from lcx.attention.spec import KernelSpec
from lcx.core.batch import Index
from lcx.core.mask import visible

MASKED = -1e30
"""Used instead of minus infinity where the difference of two such values must not be NaN."""


def dense(
    spec: KernelSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    bias_params: Any = None,
) -> Partial:
    """Softmax attention of one chunk of queries over one chunk of keys, differentiated by JAX itself.

    Computes in float32 or wider. Returns `o_BTNH` (`spec.out_dtype`, default q's) and float32 `lse_BTN`. Head n reads KV head
    n // G. A query that sees nothing has o = 0 and lse = -inf, and passes on no gradient. `spec.bias(bias_params, q_positions,
    k_positions)` is float32 `[B, N, T, S]`; its parameters are differentiable like q, k and v.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    weights, lse = weigh(spec, scaled_scores(spec, q_BTNH, k_BSKH), q_index, k_index, bias_params)
    probabilities = weights.reshape(B, K, N // K, T, S)
    o = jnp.einsum("bkgts,bskh->btkgh", probabilities, v_BSKH.astype(wide)).reshape(B, T, N, H)
    return o.astype(spec.out_dtype or q_BTNH.dtype), lse


def dense_vjp(
    spec: KernelSpec, q_BTNH: jax.Array, q_index: Index, kv_heads: int, bias_params: Any, whole: Partial, cotangent: Partial
) -> AttentionVjp:
    """The pull-back to any keys, by JAX's own derivative of the part; `merge` relates it to the whole."""
    (o, lse), (do, dlse) = whole, cotangent
    spec = dataclasses.replace(spec, out_dtype=o.dtype)

    def step(k: jax.Array, v: jax.Array, k_index: Index, in_flight: Any) -> tuple[tuple[Any, ...], Any]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, bias_params: Any) -> Partial:
            return dense(spec, q, k, v, q_index, k_index, bias_params)

        (o_part, lse_part), pull = jax.vjp(run, *map(to_fp32, (q_BTNH, k, v)), bias_params)
        seen = ~(jnp.isneginf(lse_part) | jnp.isneginf(lse))
        share = jnp.where(seen, jnp.exp(jnp.where(seen, lse_part - lse, 0.0)), 0.0)
        slope = jnp.sum(do * (o_part - o), axis=-1) + dlse
        return with_barrier(pull((do * share[..., None], jnp.where(seen, share * slope, 0.0))), in_flight)

    return AttentionVjp(zeros_fp32(q_BTNH), step, lambda dq: dq)


def scaled_scores(spec: KernelSpec, q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """scale · q·k `[B, N, T, S]` in float32 or wider."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q = q_BTNH.reshape(B, T, K, N // K, H)
    return jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=wide).reshape(B, N, T, S) * spec.scale


def weigh(spec: KernelSpec, logits: jax.Array, q_index: Index, k_index: Index, bias_params: Any) -> tuple[jax.Array, jax.Array]:
    """Softmax weights `[B, N, T, S]` and `lse_BTN` of scaled logits `[B, N, T, S]`; applies softcap, bias and mask."""
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    if spec.bias is not None:
        logits += spec.bias(bias_params, q_index.positions, k_index.positions)
    seen = visible(spec.mask, q_index, k_index)[:, None]
    logits = jnp.where(seen, logits, MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    return weights / total, jnp.swapaxes(lse, 1, 2)
