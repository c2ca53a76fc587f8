"""Which keys a query may see, as a static rule over token indices.

Legend: B batch, T query tokens, S key tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import PADDING, SHARED, Index


@dataclasses.dataclass(frozen=True)
class Band:
    """Half-open range `low <= distance < high` of query-key distances; None leaves a side open.

    With `chunk` 1 the distance is `order_q - order_k`. With a larger chunk it counts chunks: `positions_q // chunk -
    positions_k // chunk`, as dual chunk attention requires.
    """

    low: int | None = None
    high: int | None = None
    chunk: int = 1

    @property
    def everything(self) -> bool:
        """True when the band rules nothing out."""
        return self.low is None and self.high is None


@dataclasses.dataclass(frozen=True)
class Mask:
    """A static visibility rule; hashable, so that it can key a compiled program.

    `causal`: keys after the query in `order` are hidden. `window`: keys at an order distance of `window` or more are hidden
    (both sides when not causal). `prefix`: keys marked by `Index.is_prefix` are seen by their whole document regardless of
    order and window. `band` restricts the rule to one piece of a positional scheme. Segments always apply.
    """

    causal: bool = True
    window: int | None = None
    prefix: bool = False
    band: Band = Band()


def visible_pairs(length: Any, window: int | None) -> Any:
    """Query-key pairs of a causal row or document of `length` tokens, or of each of an array of lengths: T(T+1)/2, or fewer under a
    window."""
    reach = length if window is None else min(window, length) if isinstance(length, int) else np.minimum(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def visible(mask: Mask, q: Index, k: Index) -> jax.Array:
    """Boolean `[B, T, S]`: whether query t of row b may see key s."""
    return sees(mask, jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None, :], k))


def sees(mask: Mask, q: Index, k: Index) -> jax.Array:
    """Boolean: whether the query may see the key, for index arrays that broadcast against each other. This is the rule itself."""
    distance = q.order - k.order
    same = ((q.segments == k.segments) | (k.segments == SHARED)) & (k.segments != PADDING) & (q.segments != PADDING)
    reach = jnp.ones_like(same)
    if mask.causal:
        reach &= distance >= 0
    if mask.window is not None:
        reach &= (distance < mask.window) & (distance > -mask.window)
    if mask.prefix and k.is_prefix is not None:
        reach |= k.is_prefix > 0
    if not mask.band.everything:
        if mask.band.chunk > 1:
            distance = q.positions // mask.band.chunk - k.positions // mask.band.chunk
        if mask.band.low is not None:
            reach &= distance >= mask.band.low
        if mask.band.high is not None:
            reach &= distance < mask.band.high
    return same & reach


@flax.struct.dataclass
class Bounds:
    """Extremes of an index over blocks of tokens, `[B, blocks]` each: what block skipping is decided from."""

    order_min: jax.Array
    order_max: jax.Array
    position_min: jax.Array
    position_max: jax.Array
    segment_min: jax.Array
    segment_max: jax.Array
    any_shared: jax.Array
    any_prefix: jax.Array
    unpadded: jax.Array


def bounds(index: Index, block: int) -> Bounds:
    """Per-row, per-block extremes of an index `[B, T]`; T must be a multiple of `block`. Arrays come out as `[B, T // block]`.

    Padding tokens do not widen the extremes; a block of padding alone gets an empty range (min above max). Shared tokens do
    not widen those of `segments`.
    """
    low, high = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max

    def blocks(x: jax.Array) -> jax.Array:
        rows, length = x.shape
        return x.reshape(rows, length // block, block)

    segments = blocks(index.segments)
    is_token = segments != PADDING
    shared = segments == SHARED

    def smallest(x: jax.Array, keep: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(keep, x, high), axis=2)

    def largest(x: jax.Array, keep: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(keep, x, low), axis=2)

    order, positions = blocks(index.order), blocks(index.positions)
    prefix = jnp.zeros_like(is_token) if index.is_prefix is None else blocks(index.is_prefix) > 0
    return Bounds(
        order_min=smallest(order, is_token),
        order_max=largest(order, is_token),
        position_min=smallest(positions, is_token),
        position_max=largest(positions, is_token),
        segment_min=smallest(segments, is_token & ~shared),
        segment_max=largest(segments, is_token & ~shared),
        any_shared=jnp.any(shared, axis=2),
        any_prefix=jnp.any(prefix & is_token, axis=2),
        unpadded=jnp.all(is_token, axis=2),
    )


def may_see(mask: Mask, q: Bounds, k: Bounds) -> jax.Array:
    """False only where no query of the block can see any key of the block; broadcasts `q` against `k`.

    Conservative: decided from extremes, so a True may still hold no visible pair.
    """
    nonempty = (q.order_min <= q.order_max) & (k.order_min <= k.order_max)
    overlap = (q.segment_min <= k.segment_max) & (k.segment_min <= q.segment_max)
    seen = nonempty & (overlap | k.any_shared)
    reach = jnp.ones_like(seen)
    if mask.causal:
        reach &= q.order_max >= k.order_min
    if mask.window is not None:
        # Compare without subtracting extremes of empty blocks, which would overflow; those are ruled out above.
        reach &= q.order_min < jnp.where(nonempty, k.order_max, 0) + mask.window
        reach &= k.order_min < jnp.where(nonempty, q.order_max, 0) + mask.window
    if mask.prefix:
        reach |= k.any_prefix
    if not mask.band.everything:
        q_min, q_max, k_min, k_max = _band_extremes(mask.band, q, k, nonempty)
        if mask.band.low is not None:
            reach &= q_max - k_min >= mask.band.low
        if mask.band.high is not None:
            reach &= q_min - k_max < mask.band.high
    return seen & reach


def sees_all(mask: Mask, q: Bounds, k: Bounds) -> jax.Array:
    """True only where every query of the block sees every key of the block; broadcasts `q` against `k`.

    Conservative the other way: a False may still hold only visible pairs (prefix keys are not considered).
    """
    unpadded = q.unpadded & k.unpadded
    one_document = (q.segment_min == q.segment_max) & ~q.any_shared
    keys_shared = k.segment_min > k.segment_max
    seen = unpadded & one_document & (keys_shared | ((k.segment_min == q.segment_min) & (k.segment_max == q.segment_max)))
    if mask.causal:
        seen &= q.order_min >= k.order_max
    if mask.window is not None or not mask.band.everything:
        q_min, q_max, k_min, k_max = _band_extremes(Band(), q, k, unpadded)
        if mask.window is not None:
            seen &= (q_max - k_min < mask.window) & (q_min - k_max > -mask.window)
        q_min, q_max, k_min, k_max = _band_extremes(mask.band, q, k, unpadded)
        if mask.band.low is not None:
            seen &= q_min - k_max >= mask.band.low
        if mask.band.high is not None:
            seen &= q_max - k_min < mask.band.high
    return seen


def _band_extremes(band: Band, q: Bounds, k: Bounds, valid: jax.Array) -> tuple[jax.Array, ...]:
    """The values whose difference is the band's distance, 0 where a block is empty (its extremes would overflow)."""
    if band.chunk > 1:
        extremes = (q.position_min, q.position_max, k.position_min, k.position_max)
    else:
        extremes = (q.order_min, q.order_max, k.order_min, k.order_max)
    extremes = tuple(jnp.where(valid, x, 0) for x in extremes)
    return tuple(x // band.chunk for x in extremes) if band.chunk > 1 else extremes
