"""Split-KV attention: the slots of a key-value cache are split over devices, and every device sees all queries.

Each device runs the kernel over its own keys, and the partial results are joined by their log-sum-exp (Flash-Decoding, 2023;
over devices: tree attention, arXiv 2408.04093). The queries of a chunk are few and the keys of a long cache many, so queries and
results travel, T·N·H numbers each way, and the S·K·H numbers of keys and values never do.

Must be called inside `jax.shard_map`. Forward only, which is what decoding needs. Legend: B batch, T queries, S slots, N heads,
K KV heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.partial import Partial
from lcx.attention.shard import KVShard, QueryShard, shard_attention
from lcx.attention.spec import ShardSpec
from lcx.core.mesh import SEQUENCE, psum_scatter


def split_kv(shard: ShardSpec, spread: bool, queries: QueryShard, keys: KVShard, bias_params: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` in float32 or wider of the queries over the slots of all devices of the mesh's sequence axes.

    If `spread`, a device has its share of the queries and gets their results; otherwise every device has and gets all of them.
    `shard` holds the static arguments for all queries over a device's slots. Any assignment of tokens to slots is correct: the
    index identifies each slot's token.
    """
    if spread:
        queries = jax.tree.map(lambda x: jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True), queries)
    return merge_over(SEQUENCE, shard_attention(shard, queries, keys, bias_params), spread)


def merge_over(axes: tuple[str, ...], part: Partial, scatter: bool) -> Partial:
    """The attention over the keys of all devices of `axes` from each one's part; inside `jax.shard_map`.

    o' = Σ o·e^(l−m) / Σ e^(l−m) and l' = m + log Σ e^(l−m) with m = max l. With `scatter` every device gets its own share of T,
    otherwise all of it. A row that is empty everywhere keeps o = 0, lse = -inf.
    """
    o, lse = part
    top = jax.lax.pmax(lse, axes)
    # As in `merge`: an empty part has weight 0 by selection, and no difference of infinities occurs for an empty row.
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(jnp.where(jnp.isneginf(lse), 0.0, lse) - top))
    o = o.astype(weight.dtype) * weight[..., None]
    if scatter:
        share = weight.shape[1] // jax.lax.axis_size(axes)
        top = jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(axes) * share, share, axis=1)
        o, weight = (psum_scatter(x, axes, 1) for x in (o, weight))
    else:
        o, weight = jax.lax.psum((o, weight), axes)
    empty = weight == 0.0
    total = jnp.where(empty, 1.0, weight)
    return o / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total))
