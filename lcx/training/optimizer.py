"""The optimizer as one optax chain: clipping, a direction from the table, decay, and a schedule over the steps of a stage."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lcx.adapters import lora as adapters
from lcx.adapters.lora import LoraConfig
from lcx.core.configs import choice, nearest, positive
from lcx.core.errors import UserError
from lcx.core.trees import Tree, joined, paths
from lcx.training.optimizers.table import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer, by its `name` in `optimizers.table`, and its schedule.

    `lr` is the peak learning rate. `schedule` shapes it after `warmup_steps` of linear warmup: `constant`; `cosine` and `linear`
    fall to `end_fraction * lr` at the stage's end; `wsd` stays at the peak and falls linearly over the last
    `decay_fraction` of the stage. `clip_norm` bounds the global gradient norm (None: off). `z_loss` scales the squared
    log-partition term. Weight decay skips norms, biases, sinks, learned positions and all vectors.

    Patterns are regular expressions searched for in parameter paths such as `layers/attention/query/kernel`: `freeze` leaves
    parameters as they are (no gradient, no optimizer state), `decay_exclude` takes more of them out of weight decay, and
    `lr_scale` holds (pattern, factor) pairs for the learning rate, of which the first that matches counts.
    """

    name: str = "adamw"
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
    lr_scale: tuple[tuple[str, float], ...] = ()
    decay_exclude: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choice("optim.name", self.name, OPTIMIZERS)
        for field, pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"optim.{field}: {pattern!r} is not a regular expression ({error})") from error
        for pattern, factor in self.lr_scale:
            if not factor >= 0:
                raise UserError(f"optim.lr_scale={factor!r} for {pattern!r} must not be negative")
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

    @property
    def patterns(self) -> list[tuple[str, str]]:
        """All patterns, with the field that each is from."""
        scaled = [("lr_scale", pattern) for pattern, _ in self.lr_scale]
        return scaled + [(name, pattern) for name in ("decay_exclude", "freeze") for pattern in getattr(self, name)]


class ScheduleState(NamedTuple):
    """Empty: the step is passed in from outside."""


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate at each step 0, 1, ... of a stage of `steps`; float32. A fall ends at step `steps`, the first not taken."""
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


def check_patterns(config: OptimConfig, params: Tree, lora: LoraConfig | None = None) -> None:
    """Raises `UserError` for a pattern that matches no parameter, and where nothing is left to train."""
    names = [path for path, _ in paths(params)]
    for field, pattern in config.patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"optim.{field}: {pattern!r} matches no parameter{nearest(pattern, names)}")
    if not any(is_trained(config, lora, name) for name in names):
        raise UserError(f"optim.freeze={config.freeze} freezes all parameters; leave some to train")


def is_trained(config: OptimConfig, lora: LoraConfig | None, path: str) -> bool:
    """Whether a step changes the parameter at a path: unless `config.freeze` names it, or adapters are trained in its place."""
    return not _matches(config.freeze, path) and (lora is None or adapters.is_trained(path, lora))


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Parameters that are treated alike: frozen (`lr` is 0), or trained at the peak rate `lr` and with `weight_decay`."""

    lr: float
    weight_decay: float
    paths: tuple[str, ...]
    size: int

    def __str__(self) -> str:
        named = ", ".join(self.paths[:NAMED]) + (f" and {len(self.paths) - NAMED} more" if len(self.paths) > NAMED else "")
        how = f"lr {self.lr:g}, decay {self.weight_decay:g}" if self.lr else "frozen"
        return f"{how}: {named} ({self.size:,})"


NAMED = 6
"""How many parameters of a group are named."""


def groups(config: OptimConfig, lora: LoraConfig | None, params: Tree) -> list[ParamGroup]:
    """What a stage does with each parameter, those that are treated alike together; `params` may be abstract."""
    decays = dict(paths(decay_mask(params, config.decay_exclude)))
    found: dict[tuple[float, float], list[tuple[str, int]]] = {}
    for path, leaf in paths(params):
        rate = config.lr * _factor(config.lr_scale, path) if is_trained(config, lora, path) else 0.0
        key = (rate, config.weight_decay if rate and decays[path] else 0.0)
        found.setdefault(key, []).append((path, math.prod(leaf.shape)))
    return [
        ParamGroup(*key, tuple(path for path, _ in members), sum(size for _, size in members)) for key, members in found.items()
    ]


def decay_mask(params: Tree, exclude: Sequence[str] = ()) -> Tree:
    """True for the weights that decay: matrices, not norms, biases, sinks, vectors, magnitudes, learned positions or what `exclude`
    names."""

    def decays(path: tuple, leaf: Any) -> bool:
        name = joined(path)
        spared = name.startswith("positions/") or name.rpartition("/")[2] in ("scale", "bias", "sinks", "magnitude")
        return leaf.ndim > 1 and not spared and not _matches(exclude, name)

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(config: OptimConfig, steps: int, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """The chain for a stage of `steps` and parameters of a table; `update` takes the stage's step as the keyword `step`."""
    # Each extra link is there only where it is asked for, so that the optimizer state keeps its structure without it.
    scale = [_scale_by_path(config.lr_scale)] if config.lr_scale else []
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        OPTIMIZERS[config.name](config.b1, config.b2, config.eps, specs),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config.decay_exclude)),
        _scale_by_stage(learning_rate(config, steps)),
        *scale,
    )


def _scale_by_stage(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Scale by minus the schedule at the stage's own step, which dropped steps advance too (optax counts only updates)."""

    def update(updates: Tree, state: ScheduleState, params: Tree = None, *, step: jax.Array, **_: Any) -> tuple:
        rate = -jnp.asarray(schedule(step), jnp.float32)
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: ScheduleState(), update)


def _scale_by_path(scales: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiply each update by the factor of the first pattern that its path matches."""

    def one(path: tuple, update: jax.Array) -> jax.Array:
        factor = _factor(scales, joined(path))
        return update if factor == 1 else update * factor

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


def _factor(scales: Sequence[tuple[str, float]], path: str) -> float:
    return next((factor for pattern, factor in scales if re.search(pattern, path)), 1.0)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
