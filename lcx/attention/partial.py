"""Joins partial attention results by their log-sum-exp, and adds attention sinks.

Legend: B batch, T query tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Partial = tuple[jax.Array, jax.Array]
"""Normalised output `o_BTNH` and log-sum-exp `lse_BTN` (float32; -inf and o = 0 for a query that saw nothing)."""


class AttentionVjp(NamedTuple):
    """The backward pass of some queries through any keys, one part of the keys at a time.

    With o and lse of the queries over *all* their keys and the cotangents do and dlse, for one part of the keys:

        S  = cap(scale · q·kᵀ) + bias         logits of the part; cap(x) = softcap · tanh(x / softcap)
        P  = exp(S − lse)                     the part's share of the probabilities: no other part is needed
        D  = rowsum(do · o) − dlse            one number per query and head, computed once
        dS = P · (do·vᵀ − D)                  cotangent of the logits, and of the bias
        dv = Pᵀ·do    dq = scale · (dS · cap′)·k    dk = scale · (dS · cap′)ᵀ·q

    Order of calls: build once per queries; `dq = init`; for each part `(dq_part, dk, dv, dbias), in_flight = step(k_BSKH, v_BSKH,
    k_index, in_flight)` and `dq += dq_part`, float32 or wider, in the kernel's own layout; last `finalize(dq)`, `[B, T, N, H]`.
    `in_flight` is returned unchanged: (arrays that must be available when the kernel for dk and dv is done, others), transferred
    while it works.
    """

    init: jax.Array
    step: Callable[..., tuple[tuple[Any, ...], Any]]
    finalize: Callable[[jax.Array], jax.Array]


def with_barrier(gradients: tuple[Any, ...], in_flight: Any) -> tuple[tuple[Any, ...], Any]:
    """Both, with a barrier so that neither is used before the other is available."""
    return jax.lax.optimization_barrier((gradients, in_flight)) if jax.tree.leaves(in_flight) else (gradients, in_flight)


def zeros_fp32(tree: Any) -> Any:
    """Zeros of the tree's shapes in float32 or wider: for summing gradients."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)


def to_fp32(x: jax.Array) -> jax.Array:
    """`x` in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def merge(one: Partial, two: Partial) -> Partial:
    """The attention over the union of two disjoint sets of keys, in float32.

    o' = o·e^(l−l') + o2·e^(l2−l') with l' = logaddexp(l, l2). A row that is empty on one side is the other side's; a row that is
    empty on both sides keeps o = 0, lse = -inf, and no gradient through it is NaN.
    """
    (o, lse), (o2, lse2) = one, two
    top = jax.lax.stop_gradient(jnp.maximum(lse, lse2))
    empty = jnp.isneginf(top)
    top = jnp.where(empty, 0.0, top)
    # An empty side has weight 0 by selection, not by exp(-inf): its gradient must be 0, not 0·inf.
    weight, weight2 = (jnp.where(jnp.isneginf(x), 0.0, jnp.exp(jnp.where(jnp.isneginf(x), 0.0, x) - top)) for x in (lse, lse2))
    total = jnp.where(empty, 1.0, weight + weight2)
    merged = o.astype(total.dtype) * (weight / total)[..., None] + o2.astype(total.dtype) * (weight2 / total)[..., None]
    return merged, jnp.where(empty, -jnp.inf, top + jnp.log(total))


def apply_sinks(o: jax.Array, lse: jax.Array, sinks_N: jax.Array) -> Partial:
    """Adds one learned logit per head to the softmax's denominator: lse' = logaddexp(lse, sink), o·σ(lse − sink).

    `o` is `[B, T, N, H]`, `lse` float32 `[B, T, N]`, `sinks_N` `[N]`; the result is float32. Apply it once, after all merges.
    An empty row keeps o = 0 and gets the sink as its lse.
    """
    sink = jnp.broadcast_to(sinks_N.astype(lse.dtype)[None, None, :], lse.shape)
    return merge((o.astype(lse.dtype), lse), (jnp.zeros_like(o, lse.dtype), sink))
