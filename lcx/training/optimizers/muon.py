"""Muon (Jordan et al., 2024): momentum orthogonalised by Newton-Schulz, for the matrices of the layers; Adam for the rest.

Steps have AdamW's root mean square (Liu et al., 2502.16982), so that AdamW's learning rate and decay carry over.
"""

from __future__ import annotations

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from lcx.core.trees import Tree, joined

RMS = 0.2
"""Root mean square of AdamW's steps (Liu et al., 2502.16982)."""


def muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon's direction on the kernels of the layers; Adam's with `b1` and `b2` on embeddings, output head, router and vectors."""
    scaled = optax.contrib.muon(1.0, eps=eps, adam_b1=b1, adam_b2=b2, muon_weight_dimension_numbers=matrices, consistent_rms=RMS)
    # The library's chain ends in a descent at rate 1; here the sign and the rate come later.
    return optax.chain(scaled, optax.scale(-1.0))


def matrices(params: Tree) -> Tree:
    """Which axes of a kernel are the matrix's inputs and outputs; the others (layers, experts) stack matrices. None: Adam."""

    def axes(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = joined(path).split("/")
        if names[0] != "layers" or names[-1] != "kernel" or names[-2] == "router":
            return None
        if "attention" in names:  # [L, D, N, H] for queries, keys and values, [L, N, H, D] for the output
            return MuonDimensionNumbers((1, 2), (3,)) if names[-2] == "out" else MuonDimensionNumbers((1,), (2, 3))
        return MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(axes, params)
