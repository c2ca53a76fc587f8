"""How the tokens of a row are distributed over the devices that share it.

Legend: B batch, T tokens in a row, n devices of the ring that share the row.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import SequenceLayout
from lcx.core.errors import UserError
from lcx.core.mesh import multiples

SEQUENCE_LAYOUTS: tuple[SequenceLayout, ...] = get_args(SequenceLayout)


def choose_layout(asked: SequenceLayout | Literal["auto"], length: int, ring_size: int, windowed: bool) -> SequenceLayout:
    """The layout for rows of `length` tokens on a ring of `ring_size` devices.

    auto: zigzag, which balances causal attention; contiguous if all layers have a window (`windowed`), since they only need
    neighbours, and if there is no ring; striped, also even, if the length is not divisible into zigzag chunks. So, too, for
    balanced, which is for rows whose documents are known before they are dealt (`dealing`).
    """
    if asked not in ("auto", "balanced"):
        return asked
    if ring_size == 1 or windowed:
        return "contiguous"
    return "striped" if length % unit("zigzag", ring_size) else "zigzag"


def unit(layout: SequenceLayout, ring_size: int) -> int:
    """The number by which T must be divisible: two chunks per piece for zigzag, one token per piece for the others."""
    return 2 * ring_size if layout == "zigzag" else ring_size


def check_length(what: str, length: int, layout: SequenceLayout, ring_size: int) -> None:
    """Raises `UserError` naming the nearest lengths if a row of `length` cannot be split into `ring_size`."""
    size = unit(layout, ring_size)
    if length % size:
        chunks = f"2·ring={size} (zigzag chunks)" if layout == "zigzag" else f"{size} ({layout} shards)"
        raise UserError(f"{what}={length} must be divisible by {chunks}; try {multiples(length, size)}")


def arrange(tree: Any, layout: SequenceLayout, ring_size: int) -> Any:
    """Arrays `[B, T, ...]` in row order, host or device, rearranged so that part i of a plain split along T is device i's.

    Arrays `[B]`, which say something about whole rows, stay as they are.

    contiguous: tokens in order. zigzag: of 2n chunks, device i gets chunks i and 2n - 1 - i, so that under a causal mask all
    devices have the same work. striped: device i gets tokens i, i + n, ... (arXiv 2311.09431). Uses reshape and flip: a gather
    would become a serial loop on a TPU. Shift labels first. Rows of which each is dealt by its documents (balanced) are dealt
    where they are made.
    """
    if layout == "balanced":
        raise ValueError("balanced rows are dealt by their documents: see `dealing.deal`")

    def one(x: Any) -> Any:
        if x.ndim == 1:
            return x
        B, T, *rest = x.shape
        check_length("a row's length", T, layout, ring_size)
        if layout == "zigzag":
            chunks = x.reshape(B, 2, ring_size, T // (2 * ring_size), *rest)
            chunks = _module(x).stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2)
            return chunks.reshape(x.shape)
        return x.reshape(B, T // ring_size, ring_size, *rest).swapaxes(1, 2).reshape(x.shape)

    return tree if layout == "contiguous" or ring_size == 1 else jax.tree.map(one, tree)


def restore(tree: Any, layout: SequenceLayout, ring_size: int) -> Any:
    """The inverse of `arrange`, for outputs `[B, T, ...]`."""

    def one(x: Any) -> Any:
        B, T, *rest = x.shape
        if layout == "zigzag":
            chunks = x.reshape(B, ring_size, 2, T // (2 * ring_size), *rest)
            chunks = _module(x).stack([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
            return chunks.reshape(x.shape)
        return x.reshape(B, ring_size, T // ring_size, *rest).swapaxes(1, 2).reshape(x.shape)

    return tree if layout == "contiguous" or ring_size == 1 else jax.tree.map(one, tree)


def _module(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp
