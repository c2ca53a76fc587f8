"""Attention on a TPU or a GPU in tiles that never leave the chip: the same function as `dense`, in Pallas.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.blockwise import SAVED
from lcx.attention.pallas import gpu_backward, gpu_forward, tpu_backward, tpu_forward
from lcx.attention.pallas.tiling import Platform, Rule, join_heads, query_residuals
from lcx.attention.partial import AttentionVjp, Partial
from lcx.attention.tiles import Blocks
from lcx.core.batch import Index
from lcx.core.mask import Mask


def flash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    mask: Mask,
    *,
    slopes: jax.Array | None = None,
    scale: float,
    softcap: float | None = None,
    blocks: Blocks,
    out_dtype: Any = None,
    platform: Platform = "tpu",
    interpret: bool = False,
) -> Partial:
    """`(o_BTNH, lse_BTN)` as `blockwise` returns them, for bfloat16 or float32 on a TPU or a GPU; both are differentiable.

    The only bias is ALiBi's: float32 `slopes` `[N]`, subtracted times |distance of positions|. Of `blocks`, `q` and `k` are used.
    Sums are float32. `platform` selects the kernel; a GPU's needs blocks that are powers of two of at least 16. `interpret`
    interprets the kernel without such a device, for tests.
    """
    rule = Rule(mask, slopes is not None, scale, softcap, blocks, jnp.dtype(out_dtype or q_BTNH.dtype), platform, interpret)
    return _attend(rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes)


def flash_vjp(
    q_BTNH: jax.Array,
    q_index: Index,
    mask: Mask,
    kv_heads: int,
    *,
    slopes: jax.Array | None = None,
    scale: float,
    softcap: float | None = None,
    blocks: Blocks,
    platform: Platform = "tpu",
    interpret: bool = False,
    whole: Partial,
    cotangent: Partial,
) -> AttentionVjp:
    """The pull-back to any keys, with `dslopes` after dv; `whole` and `cotangent` as in `blockwise_vjp`."""
    rule = Rule(mask, slopes is not None, scale, softcap, blocks, jnp.dtype(jnp.float32), platform, interpret)
    return _kernel_vjp(rule, q_BTNH, q_index, slopes, kv_heads, whole, cotangent)


def _forward(rule: Rule, *args) -> Partial:
    return (gpu_forward if rule.platform == "gpu" else tpu_forward).forward(rule, *args)


def _kernel_vjp(rule: Rule, q_BTNH, q_index, slopes, kv_heads: int, whole: Partial, cotangent: Partial) -> AttentionVjp:
    if rule.platform == "gpu":
        backward, ready = gpu_backward.backward, gpu_backward.query_residuals(rule, q_BTNH, q_index, slopes, whole, cotangent)
    else:
        backward, ready = tpu_backward.backward, query_residuals(rule, q_BTNH, q_index, slopes, kv_heads, whole, cotangent)

    def finalize(dq: jax.Array) -> jax.Array:
        return join_heads(dq[..., : q_BTNH.shape[3]], rule.blocks.q, q_BTNH.shape)

    return AttentionVjp(jnp.zeros(ready.queries.q.shape, jnp.float32), functools.partial(backward, rule, ready), finalize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, q_index, k_index, slopes):
    return _forward(rule, q, k, v, q_index, k_index, slopes)


def _attend_fwd(rule, q, k, v, q_index, k_index, slopes):
    whole = tuple(checkpoint_name(x, SAVED) for x in _forward(rule, q, k, v, q_index, k_index, slopes))
    return whole, (q, k, v, q_index, k_index, slopes, whole)


def _attend_bwd(rule, residuals, cotangent):
    q, k, v, q_index, k_index, slopes, whole = residuals
    pull = _kernel_vjp(rule, q, q_index, slopes, k.shape[2], whole, cotangent)
    (dq, dk, dv, dslopes), _ = pull.step(k, v, k_index, ())
    dslopes = None if slopes is None else dslopes.astype(slopes.dtype)
    return pull.finalize(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, dslopes


_attend.defvjp(_attend_fwd, _attend_bwd)
