"""Muon (Jordan et al., 2024): momentum orthogonalised by Newton-Schulz, for the matrices of the layers; Adam for the rest.

Steps have AdamW's root mean square (Liu et al., 2502.16982), so that AdamW's learning rate and decay carry over.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from lcx.core.param_spec import ParamSpec, paths_of
from lcx.core.trees import Tree, joined

RMS = 0.2
"""Root mean square of AdamW's steps (Liu et al., 2502.16982)."""


def muon(b1: float, b2: float, eps: float, specs: Tree) -> optax.GradientTransformation:
    """Muon's direction on the kernels of the layers; Adam's with `b1` and `b2` on embeddings, output head, router and vectors."""
    axes = functools.partial(matrices, dict(paths_of(specs)))
    scaled = optax.contrib.muon(1.0, eps=eps, adam_b1=b1, adam_b2=b2, muon_weight_dimension_numbers=axes, consistent_rms=RMS)
    # The library's chain ends in a descent at rate 1; here the sign and the rate come later.
    return optax.chain(scaled, optax.scale(-1.0))


def matrices(specs: Mapping[str, ParamSpec], params: Tree) -> Tree:
    """Which axes of a kernel are the matrix's inputs and outputs; the others (layers, experts) stack matrices. None: Adam."""

    def axes(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        name = joined(path)
        spec = specs[name]
        if not spec.stacked or not spec.inputs or name.endswith("/router/kernel"):
            return None
        outputs = spec.stacked + spec.inputs
        return MuonDimensionNumbers(tuple(range(spec.stacked, outputs)), tuple(range(outputs, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)
