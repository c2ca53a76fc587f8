"""How blockwise attention cuts its arrays into tiles, and which tiles it visits.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim. A *group* is the part of batch and KV heads
that is processed at once: `rows` batch rows and `heads` KV heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.attention.dense import MASKED
from lcx.attention.partial import Partial
from lcx.attention.spec import Blocks
from lcx.core.batch import Index
from lcx.core.mask import Bounds, Mask, bounds, may_see, sees_all


class Visits(NamedTuple):
    """Block pairs visited, and how many there are in total."""

    visited: jax.Array
    total: int


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """Pads axis 1 with zeros (segment 0, hence padding) up to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def fold(x_BTNH: jax.Array, block: int, blocks: Blocks, kv_heads: int) -> jax.Array:
    """`[B, T, K·G, H]` as tiles `[groups, T/block, rows, heads, G·block, H]`, padded with zeros along T."""
    x = _pad(x_BTNH, block)
    B, T, N, H = x.shape
    shape = (B // blocks.rows, blocks.rows, T // block, block, kv_heads // blocks.heads, blocks.heads, N // kv_heads, H)
    x = x.reshape(shape).transpose(0, 4, 2, 1, 5, 6, 3, 7)
    return x.reshape(-1, T // block, blocks.rows, blocks.heads, N // kv_heads * block, H)


def unfold(x: jax.Array, block: int, blocks: Blocks, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `fold`: tiles back to `shape` = `[B, T, N, H]`."""
    B, T, _, H = shape
    groups, count, rows, heads, folded, _ = x.shape
    x = x.reshape(B // rows, groups * rows // B, count, rows, heads, folded // block, block, H)
    x = x.transpose(0, 3, 2, 6, 1, 4, 5, 7).reshape(B, count * block, -1, H)
    return x[:, :T]


def fold_index(index: Index, block: int, blocks: Blocks, kv_heads: int) -> Index:
    """Index arrays `[B, T]` as `[groups, T/block, rows, block]`; the tail is padding (segment 0)."""

    def tiles(x: jax.Array) -> jax.Array:
        x = _pad(x, block)
        B, T = x.shape
        x = x.reshape(B // blocks.rows, blocks.rows, T // block, block).transpose(0, 2, 1, 3)
        return jnp.repeat(x, kv_heads // blocks.heads, axis=0)

    return jax.tree.map(tiles, index)


def block_bounds(index: Index) -> Bounds:
    """Bounds `[rows, blocks]` of one group's tiles `[blocks, rows, block]`."""
    block = index.order.shape[-1]
    return bounds(jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1), index), block)


def row_terms(whole: Partial, cotangent: Partial, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`(lse, D)` `[B, T, N]`, with which p = exp(logits − lse) and the cotangent of the logits is p · (dp − D).

    D = rowsum(do · o) − dlse. A row that saw nothing gets p = exp(−huge) = 0.
    """
    (o, lse), (do, dlse) = whole, cotangent
    delta = jnp.einsum("...h,...h->...", do.astype(dtype), o.astype(dtype), precision="highest") - dlse
    return jnp.where(jnp.isneginf(lse), -MASKED, lse), delta


def visits(mask: Mask, q: Bounds, k: Bounds) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Key blocks that one query block has to visit: (list, end of the fully visible ones, end of the partially visible ones).

    `q` are the bounds `[rows, 1]` of the query block, `k` those `[rows, blocks]` of the keys. The int32 list holds first the
    blocks that every query sees completely (no mask to compute), then those that need the mask, each in ascending order.
    """
    some = jnp.any(may_see(mask, q, k), axis=0)
    whole = jnp.all(sees_all(mask, q, k), axis=0) & some
    count = some.shape[0]
    rank = jnp.where(whole, 0, jnp.where(some, 1, 2)).astype(jnp.int32)
    order = jnp.sort(rank * count + jnp.arange(count, dtype=jnp.int32)) % count
    return order, jnp.sum(whole, dtype=jnp.int32), jnp.sum(some, dtype=jnp.int32)


def visited_pairs(mask: Mask, q_index: Index, k_index: Index, block_q: int, block_k: int) -> Visits:
    """How many pairs of a query block and a key block blockwise attention computes, of how many, over all rows of a batch."""
    q = bounds(jax.tree.map(lambda x: _pad(x, block_q), q_index), block_q)
    k = bounds(jax.tree.map(lambda x: _pad(x, block_k), k_index), block_k)
    pairs = may_see(mask, jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None, :], k))
    return Visits(jnp.sum(pairs, dtype=jnp.int32), pairs.size)
