"""AdamW (Loshchilov & Hutter, 1711.05101)."""

from __future__ import annotations

import optax

from lcx.core.trees import Tree


def adamw(b1: float, b2: float, eps: float, specs: Tree) -> optax.GradientTransformation:
    """Adam's direction; decay and learning rate follow for all optimizers alike."""
    return optax.scale_by_adam(b1, b2, eps)
