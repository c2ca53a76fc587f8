"""The record that the loader hands to the training step.

Legend: B batch rows, T tokens in a row.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

SequenceLayout = Literal["contiguous", "zigzag", "striped", "balanced"]
"""The orders in which the devices of a ring hold a row's tokens; `balanced` is another one for each row, by its documents."""

PADDING = 0
"""Segment id of padding: no query sees such a key, and such a query sees no key."""

SHARED = 2**31 - 1
"""Segment id of a key that every document sees (the shared BOS anchor)."""


@flax.struct.dataclass
class Index:
    """What attention knows about each token: int32 arrays, each `[B, T]`.

    `order` is the row index before any permutation; masks and windows compare it. `positions` is what positional schemes
    see. `segments` is the document id (`PADDING` and `SHARED` are reserved). `is_prefix` (or None) is 1 for keys that every query
    of their document sees, whatever the order. `layout` says how rows are distributed over the devices that share them
    (`attention.parallel.sequence_layout`); strategies may rely on it, masks never do. `reach` (with `balanced` alone) is in a ring
    of how many devices the key is needed (`attention.parallel.dealing`), and `parts` are scalars that follow from it
    (`attention.parallel.nested.parts_of`), the same for all layers.
    """

    order: jax.Array
    positions: jax.Array
    segments: jax.Array
    is_prefix: jax.Array | None = None
    reach: jax.Array | None = None
    parts: tuple[jax.Array, ...] | None = None
    layout: SequenceLayout = flax.struct.field(pytree_node=False, default="contiguous")

    @classmethod
    def dense(cls, batch: int, length: int) -> "Index":
        """One document per row, positions equal to the order."""
        order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(order=order, positions=order, segments=jnp.ones_like(order))

    def slice(self, start: int | jax.Array, size: int) -> "Index":
        """`size` tokens from `start` along T (dynamic start allowed)."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), self)


@flax.struct.dataclass
class Batch:
    """Training or scoring rows: int32 `[B, T]` each, `loss_weights` float32 `[B, T]`.

    `targets[b, t]` is the token that follows `tokens[b, t]` in its row (shifted before any permutation); `loss_weights` scales its
    loss, 0 where there is nothing to predict. `layout` and `reach` as in `Index`. `row_parts` int32 `[B]` (or None) is the number
    of the part of a mixture that a row comes from, below `num_parts`.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_weights: jax.Array
    order: jax.Array
    positions: jax.Array
    segments: jax.Array
    is_prefix: jax.Array | None = None
    reach: jax.Array | None = None
    row_parts: jax.Array | None = None
    layout: SequenceLayout = flax.struct.field(pytree_node=False, default="contiguous")
    num_parts: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def index(self) -> Index:
        """The attention index of the rows."""
        return Index(self.order, self.positions, self.segments, self.is_prefix, self.reach, layout=self.layout)

    @classmethod
    def from_tokens(cls, tokens: np.ndarray | jax.Array, loss_weights: np.ndarray | jax.Array | None = None) -> "Batch":
        """Rows of `T + 1` tokens, one document each, as a batch of `T` predictions.

        `tokens` is int `[B, T + 1]`; `loss_weights` float32 `[B, T + 1]` belongs to the token that is predicted (default 1).
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        loss_weights = jnp.ones_like(tokens, jnp.float32) if loss_weights is None else jnp.asarray(loss_weights, jnp.float32)
        index = Index.dense(rows, length)
        return cls(tokens[:, :-1], tokens[:, 1:], loss_weights[:, 1:], index.order, index.positions, index.segments)


def cut_tokens(tree: Any, count: int) -> Any:
    """Arrays `[B, T, ...]` as `[count, B, T / count, ...]`: the tokens in equal parts, to be taken one after another."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], count, -1, *x.shape[2:]).swapaxes(0, 1), tree)


def join_tokens(parts: Any) -> Any:
    """The inverse of `cut_tokens`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), parts)
