"""The attention matrix itself, for those who look at it; training and decoding never make it.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.dense import scaled_scores, weigh
from lcx.attention.spec import AttentionSpec, KernelSpec
from lcx.core.batch import Index
from lcx.positions.query_scaling import scale_queries
from lcx.positions.rotary import Tables, rotate_by


def attention_weights(
    spec: AttentionSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    *,
    q_tables: Tables,
    k_tables: Tables,
    bias_params: Any = None,
    query_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Weights float32 `[B, N, T, S]` with which `attend` would average the values; arguments as there, on one device.

    A row sums to 1, to less with `sinks` `[N]`, to 0 for a query that sees no key.
    """
    q_BTNH = scale_queries(q_BTNH, query_scale)
    parts = []
    for region in spec.scheme.regions:
        kernel = KernelSpec(dataclasses.replace(spec.mask, band=region.band), spec.scale, spec.softcap, spec.scheme.bias)
        q = rotate_by(q_BTNH, region.q_rotation, q_tables, spec.scheme.layout)
        k = rotate_by(k_BSKH, region.k_rotation, k_tables, spec.scheme.layout)
        parts.append(weigh(kernel, scaled_scores(kernel, q, k), q_index, k_index, bias_params))
    lse = functools.reduce(jnp.logaddexp, (lse for _, lse in parts))
    whole = lse if sinks is None else jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, None])
    empty = jnp.isneginf(whole)
    # Bands are disjoint, so that a key has its weight in one region and 0 in the others.
    scaled = (w * jnp.swapaxes(jnp.exp(jnp.where(empty, -jnp.inf, part - whole)), 1, 2)[..., None] for w, part in parts)
    return functools.reduce(jnp.add, scaled).astype(jnp.float32)
