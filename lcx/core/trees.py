"""Small operations on parameter trees: nested dicts of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core import quantized

Tree = Any
"""A nested dict whose leaves are arrays (or abstract arrays), some of them perhaps quantised."""


def paths(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Leaves with their path joined by `/`, in the tree's own order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=quantized.is_quantized):
        yield joined(path), leaf


def map_paths(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """The tree with `function` of each leaf's path joined by `/`, and the leaf, in its place."""
    return jax.tree_util.tree_map_with_path(lambda path, x: function(joined(path), x), tree, is_leaf=quantized.is_quantized)


def joined(path: tuple[Any, ...]) -> str:
    """A leaf's path, as `jax.tree_util` gives it, joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def num_bytes(tree: Tree) -> int:
    """Total bytes of the leaves, abstract leaves included."""
    return sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def num_elements(tree: Tree) -> int:
    """Total number of elements of the leaves."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree, is_leaf=quantized.is_quantized))


def cast(tree: Tree, dtype: jnp.dtype) -> Tree:
    """The tree with floating-point leaves in `dtype`; others unchanged."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
