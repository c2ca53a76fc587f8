"""The optimizer as one optax chain: clipping, AdamW with a decay mask, and a schedule over the steps of a stage."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.trees import Tree


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, 1711.05101) and its schedule.

    `lr` is the peak learning rate. `schedule` shapes it after `warmup_steps` of linear warmup: `constant`; `cosine` and `linear`
    fall to `end_fraction * lr` at the stage's last step; `wsd` stays at the peak and falls linearly over the last
    `decay_fraction` of the stage. `clip_norm` bounds the global gradient norm (None: off). `z_loss` scales the squared
    log-partition term. Weight decay skips norms, biases, sinks, learned positions and all vectors.
    """

    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = 0
    end_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        positive("optim", lr=self.lr, eps=self.eps, clip_norm=self.clip_norm)
        for name in ("warmup_steps", "weight_decay", "z_loss"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name}={getattr(self, name)!r} must not be negative")
        for name in ("end_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name}={getattr(self, name)!r} must be a fraction from 0 to 1")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)!r} must be at least 0 and below 1")


class ScheduleState(NamedTuple):
    """Empty: the step is passed in from outside."""


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step 0, 1, ... of a stage of `steps`; float32."""
    warmup = min(config.warmup_steps, max(0, steps - 1))
    rest = max(1, steps - warmup)
    end = config.lr * config.end_fraction
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(config.lr)
        case "cosine":
            main = optax.cosine_decay_schedule(config.lr, rest, alpha=config.end_fraction)
        case "linear":
            main = optax.linear_schedule(config.lr, end, rest)
        case _:
            fall = min(rest, max(1, round(config.decay_fraction * steps)))
            main = optax.linear_schedule(config.lr, end, fall, transition_begin=rest - fall)
    if not warmup:
        return main
    # The rise starts above zero, so that the first step already learns.
    rise = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    return optax.join_schedules([rise, main], [warmup])


def decay_mask(params: Tree) -> Tree:
    """True for the weights that decay: matrices, not norms, biases, sinks, vectors or learned positions."""

    def decays(path: tuple, leaf: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return leaf.ndim > 1 and names[0] != "positions" and names[-1] not in ("scale", "bias", "sinks")

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The chain for a stage of `steps`; `update` takes the stage's step as the keyword `step`."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        _scale_by_stage(learning_rate(config, steps)),
    )


def _scale_by_stage(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale by minus the schedule at the stage's own step, which dropped steps advance too (optax counts only updates)."""

    def update(updates: Tree, state: ScheduleState, params: Tree = None, *, step: jax.Array, **_: Any) -> tuple:
        rate = -jnp.asarray(schedule(step), jnp.float32)
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: ScheduleState(), update)
