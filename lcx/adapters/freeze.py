"""Parameter trees in two parts: what is trained, and what is frozen."""

from __future__ import annotations

from collections.abc import Callable

import flax.traverse_util

from lcx.core.trees import Tree


def split(tree: Tree, is_trained: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The leaves of nested dicts whose `/`-joined path `is_trained`, and the others; each part is a nested dict."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return flax.traverse_util.unflatten_dict(chosen, sep="/"), flax.traverse_util.unflatten_dict(rest, sep="/")


def join(*parts: Tree) -> Tree:
    """Nested dicts with different leaves as one; the only one that is not empty as it is."""
    parts = tuple(part for part in parts if part)
    if len(parts) == 1:
        return parts[0]
    flat: dict[str, Tree] = {}
    for part in parts:
        flat |= flax.traverse_util.flatten_dict(part, sep="/")
    return flax.traverse_util.unflatten_dict(flat, sep="/")
