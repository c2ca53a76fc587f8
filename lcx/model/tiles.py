"""Work on tokens, tile by tile, inside the part of a row that a device holds.

Legend: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lcx.core.batch import cut_tokens, join_tokens
from lcx.core.mesh import SEQUENCE, context_size
from lcx.core.trees import Tree


def count_tiles(length: int, most: int | None) -> int:
    """Into how many equal tiles of about `most` tokens, at most that many, `length` tokens are cut; 1 if no such number divides."""
    if most is None or length <= most:
        return 1
    least = -(-length // most)
    return next((n for n in range(least, 2 * least) if length % n == 0), 1)


def shard_length(length: int) -> int:
    """Tokens that each device of the current mesh has of a row of `length`, which the mesh may not split evenly."""
    return -(-length // context_size())


def over_tiles(run: Callable[..., Any], params: Tree, arrays: tuple[Any, ...], count: int) -> Any:
    """`run(params, *arrays)` over `count` tiles of the tokens of each device; `arrays` and results are `[B, T, ...]`, or None.

    A tile's work is recomputed in the backward pass, which keeps its arguments. Weights are gathered once, and their gradients are
    summed over the tiles in float32 and over the devices once.
    """

    def here(params: Tree, arrays: tuple[Any, ...]) -> Any:
        wide = jax.tree.map(_widened, params)

        def one(part: tuple[Any, ...]) -> Any:
            return run(jax.tree.map(lambda w, like: w.astype(like.dtype), wide, params), *part)

        return join_tokens(jax.lax.map(jax.checkpoint(one, prevent_cse=False), cut_tokens(arrays, count)))

    if context_size() == 1:
        return here(params, arrays)
    # The compiler would cut tiles across devices, and reduce the gradients of weights once for every tile.
    tokens = PartitionSpec(None, SEQUENCE)
    split = jax.shard_map(here, in_specs=(PartitionSpec(), tokens), out_specs=tokens, axis_names=set(SEQUENCE), check_vma=False)
    return split(params, arrays)


def _widened(x: jax.Array) -> jax.Array:
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if narrow else x
