"""How far two trees of arrays are apart."""

from __future__ import annotations

import jax
import numpy as np

from lcx.core.trees import Tree, paths


def worst_error(tree: Tree, reference: Tree) -> tuple[float, str]:
    """Largest `max|leaf - reference| / max(1, max|reference|)` over the leaves, and the path of that leaf.

    Raises `ValueError` when the two trees differ in structure. A NaN anywhere counts as infinite.
    """
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        raise ValueError(f"trees differ in structure: {jax.tree.structure(tree)} and {jax.tree.structure(reference)}")
    worst, where = 0.0, ""
    for (path, leaf), wanted in zip(paths(tree), jax.tree.leaves(reference), strict=True):
        leaf, wanted = np.asarray(leaf, np.float64), np.asarray(wanted, np.float64)
        if not leaf.size:
            continue
        error = np.max(np.abs(leaf - wanted)) / max(1.0, np.max(np.abs(wanted)))
        error = float("inf") if np.isnan(error) else float(error)
        if error >= worst:
            worst, where = error, path
    return worst, where
