"""Adafactor (Shazeer & Stern, 1804.04235): second moments of matrices as a row and a column."""

from __future__ import annotations

import optax

from lcx.core.trees import Tree


def adafactor(b1: float, b2: float, eps: float, specs: Tree) -> optax.GradientTransformation:
    """Adafactor's direction, its step relative to the size of each parameter; it has a schedule in place of `b1`, `b2`, `eps`."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
