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
from lcx.attention.pallas.tiling import join_heads, query_residuals
from lcx.attention.partial import AttentionVjp, Partial, zeros_fp32
from lcx.attention.spec import KernelSpec
from lcx.core.batch import Index


def flash(
    spec: KernelSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    bias_params: Any = None,
) -> Partial:
    """`(o_BTNH, lse_BTN)` as `blockwise` returns them, for bfloat16 or float32 on a TPU or a GPU; both are differentiable.

    The only bias is ALiBi's. Of `spec.blocks`, `q` and `k` are used; a GPU's must be powers of two of at least 16. Sums are
    float32.
    """
    # Outside the custom VJP, since on a mesh the slopes of a device are sliced by its place there.
    slopes_N = None if spec.bias is None else spec.bias.slopes(bias_params)
    return _flash(spec, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes_N)


def flash_vjp(
    spec: KernelSpec, q_BTNH: jax.Array, q_index: Index, kv_heads: int, bias_params: Any, whole: Partial, cotangent: Partial
) -> AttentionVjp:
    """The pull-back to any keys, with `dbias_params` after dv; `whole` and `cotangent` as in `blockwise_vjp`."""
    slopes_N, to_bias = None, lambda _: (zeros_fp32(bias_params),)
    if spec.bias is not None:
        slopes_N, to_bias = jax.vjp(spec.bias.slopes, bias_params)
    pull = _flash_vjp(spec, q_BTNH, q_index, slopes_N, kv_heads, whole, cotangent)

    def step(*args) -> tuple[tuple[Any, ...], Any]:
        (*gradients, dslopes), in_flight = pull.step(*args)
        return (*gradients, *to_bias(dslopes)), in_flight

    return pull._replace(step=step)


def _forward(spec: KernelSpec, *args) -> Partial:
    return (gpu_forward if spec.platform == "gpu" else tpu_forward).forward(spec, *args)


def _flash_vjp(spec: KernelSpec, q_BTNH, q_index, slopes_N, kv_heads: int, whole: Partial, cotangent: Partial) -> AttentionVjp:
    if spec.platform == "gpu":
        backward, residuals = gpu_backward.backward, gpu_backward.query_residuals(spec, q_BTNH, q_index, slopes_N, whole, cotangent)
    else:
        backward, residuals = tpu_backward.backward, query_residuals(spec, q_BTNH, q_index, slopes_N, kv_heads, whole, cotangent)

    def finalize(dq: jax.Array) -> jax.Array:
        return join_heads(dq[..., : q_BTNH.shape[3]], spec.tiles.q, q_BTNH.shape)

    return AttentionVjp(jnp.zeros(residuals.queries.q.shape, jnp.float32), functools.partial(backward, spec, residuals), finalize)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(spec, q, k, v, q_index, k_index, slopes):
    return _forward(spec, q, k, v, q_index, k_index, slopes)


def _flash_fwd(spec, q, k, v, q_index, k_index, slopes):
    whole = tuple(checkpoint_name(x, SAVED) for x in _forward(spec, q, k, v, q_index, k_index, slopes))
    return whole, (q, k, v, q_index, k_index, slopes, whole)


def _flash_bwd(spec, residuals, cotangent):
    q, k, v, q_index, k_index, slopes, whole = residuals
    pull = _flash_vjp(spec, q, q_index, slopes, k.shape[2], whole, cotangent)
    (dq, dk, dv, dslopes), _ = pull.step(k, v, k_index, ())
    dslopes = None if slopes is None else dslopes.astype(slopes.dtype)
    return pull.finalize(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, dslopes


_flash.defvjp(_flash_fwd, _flash_bwd)
