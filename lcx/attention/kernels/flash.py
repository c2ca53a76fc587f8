"""Attention on a TPU in tiles that never leave the chip: the same function as `dense`, in Pallas.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.blockwise import SAVED
from lcx.attention.kernels.backward import backward
from lcx.attention.kernels.forward import forward
from lcx.attention.kernels.grid import Rule
from lcx.attention.merge import Partial
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
    interpret: bool = False,
) -> Partial:
    """`(o_BTNH, lse_BTN)` as `blockwise` gives them, for bfloat16 or float32 on a TPU; both are differentiable.

    The one bias is ALiBi's: float32 `slopes` `[N]`, subtracted times |distance of positions|. Of `blocks`, `q` and `k` count.
    Sums are float32. `interpret` runs the kernel without a TPU, for tests.
    """
    rule = Rule(mask, slopes is not None, scale, softcap, blocks, jnp.dtype(out_dtype or q_BTNH.dtype), interpret)
    return _attend(rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes)


def flash_backward(
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
    interpret: bool = False,
    whole: Partial,
    cotangent: Partial,
    beside: Any = (),
) -> tuple[tuple[jax.Array, ...], Any]:
    """float32 gradients `(dq, dk, dv, dslopes)` that go through these keys; `whole` and `cotangent` as in `blockwise_backward`.

    `beside` comes back as it is: arrays that must be there as soon as the kernels are done, so that they travel meanwhile.
    """
    rule = Rule(mask, slopes is not None, scale, softcap, blocks, jnp.dtype(jnp.float32), interpret)
    return backward(rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, slopes, whole, cotangent, beside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, q_index, k_index, slopes):
    return forward(rule, q, k, v, q_index, k_index, slopes)


def _attend_fwd(rule, q, k, v, q_index, k_index, slopes):
    whole = tuple(checkpoint_name(x, SAVED) for x in forward(rule, q, k, v, q_index, k_index, slopes))
    return whole, (q, k, v, q_index, k_index, slopes, whole)


def _attend_bwd(rule, residuals, cotangent):
    q, k, v, _, _, slopes, _ = residuals
    (dq, dk, dv, dslopes), _ = backward(rule, *residuals, cotangent, ())
    dslopes = None if slopes is None else dslopes.astype(slopes.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, dslopes


_attend.defvjp(_attend_fwd, _attend_bwd)
