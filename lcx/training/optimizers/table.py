"""The optimizers by name: each gives the direction of a step, before decay and learning rate.

They are built from `b1`, `b2`, `eps` and the table of `ParamSpec`s.
"""

from __future__ import annotations

from collections.abc import Callable

import optax

from lcx.core.trees import Tree
from lcx.training.optimizers.adafactor import adafactor
from lcx.training.optimizers.adamw import adamw
from lcx.training.optimizers.lion import lion
from lcx.training.optimizers.muon import muon

OPTIMIZERS: dict[str, Callable[[float, float, float, Tree], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "adafactor": adafactor,
    "lion": lion,
}
