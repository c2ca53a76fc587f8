"""The optimizers by name: each gives the direction of a step from `b1`, `b2` and `eps`, before decay and learning rate."""

from __future__ import annotations

from collections.abc import Callable

import optax

from lcx.training.optimizers.adafactor import adafactor
from lcx.training.optimizers.adamw import adamw
from lcx.training.optimizers.lion import lion
from lcx.training.optimizers.muon import muon

OPTIMIZERS: dict[str, Callable[[float, float, float], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "adafactor": adafactor,
    "lion": lion,
}
