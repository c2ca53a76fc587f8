"""The early-perplexity monitor: does the loss of a stage go straight down in its first steps, or is its theta wrong?

The statistic, over the logarithms y_0 ... y_{K-1} of the training loss (after `skip` steps of warm-up):

- fall: minus the Theil-Sen slope (the median of all pairwise slopes; Sen 1968) times K - 1, the trend over the window.
- wobble: 1.4826 times the median absolute residual around that line, a robust deviation.
- straightness: fall / wobble.
- swing: wobble / noise, where noise is the same robust deviation of successive differences over sqrt(2). It is 1 where only the
  batches differ from one another, and grows when the loss moves up and down over several steps.
- up-pairs: of all pairs of steps, the share in which the later loss is higher (Kendall 1938): 0 straight down, 0.5 no trend.

Perplexity alone can look fine while retrieval fails, so a fixed held-out probe is evaluated before the first step and after step K:

- text gain, needle gain: 1 - loss after / before, on text and on needle answers; needle accuracy: share of answer tokens predicted.
- text excess, needle excess: loss after - loss of the stage's initial weights on the same probe at the length and with the scheme
  of the previous stage, in nats per token: what the model could do before and cannot do at the new length (yet).

The excesses matter most. With a good theta the loss may have little left to fall, as the stage begins where the last one ended.
With a bad one it begins high and at first falls perfectly steadily, while the needles stay lost.

A stage counts as oscillating when its loss goes up more often than down, when it swings without falling, or when text or needles
are lost. All thresholds are fields of `MonitorConfig`; `experiments/003_monitor` measures how often they are right.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import Batch
from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture
from lcx.model.loss import token_losses
from lcx.model.recurrent import hidden_states

FEWEST = 8
"""The fewest losses that a statistic can be computed from."""


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """When and how a stage is judged; the statistics are defined at the top of the module.

    A stage is judged after `steps` steps, of which the first `skip` are ignored, and on `probe_rows` rows of held-out text and
    needles. `retries` is how many further thetas may be tried.
    """

    enabled: bool = False
    steps: int = 40
    skip: int = 4
    probe_rows: int = 16
    retries: int = 4
    min_straightness: float = 1.0
    max_swing: float = 2.0
    max_up_pairs: float = 0.6
    min_text_gain: float = -0.02
    max_text_excess: float = 0.15
    min_needle_gain: float = 0.05
    max_needle_excess: float = 0.7
    enough_needle_accuracy: float = 0.9

    def __post_init__(self) -> None:
        positive("monitor", steps=self.steps, retries=self.retries)
        if self.probe_rows < 2:
            raise UserError(f"monitor.probe_rows={self.probe_rows} is too few for both text and needles; give at least 2")
        if not 0 <= self.skip <= self.steps - FEWEST:
            raise UserError(f"monitor.skip={self.skip} must leave at least {FEWEST} of monitor.steps={self.steps} steps")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Statistics of a loss curve, as the module defines them."""

    fall: float
    wobble: float
    straightness: float
    swing: float
    up_pairs: float


@dataclasses.dataclass(frozen=True)
class Probe:
    """Results of the held-out probe: losses in nats per token, accuracy per token of the needle answers."""

    text_loss: float
    needle_loss: float
    needle_accuracy: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """A verdict with everything that it is based on."""

    verdict: Literal["straight down", "oscillating"]
    reason: str
    statistics: dict[str, float]
    thresholds: dict[str, float]


def curve(losses: Sequence[float]) -> Curve:
    """Statistics of training losses in nats, one per step, at least `FEWEST`; the worst ones if any loss is not finite."""
    y = np.asarray(losses, np.float64)
    if len(y) < FEWEST:
        raise ValueError(f"{len(y)} losses are too few; at least {FEWEST} are needed")
    if not np.all(np.isfinite(y)) or np.any(y <= 0):
        return Curve(-math.inf, math.inf, -math.inf, math.inf, 1.0)
    y, x = np.log(y), np.arange(len(y), dtype=np.float64)
    i, j = np.triu_indices(len(y), 1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    wobble, noise = _deviation(y - slope * x), _deviation(np.diff(y)) / math.sqrt(2)
    fall = -slope * (len(y) - 1)
    return Curve(fall, wobble, fall / max(wobble, 1e-9), wobble / max(noise, 1e-9), float(np.mean(y[j] > y[i])))


def _deviation(x: np.ndarray) -> float:
    return 1.4826 * float(np.median(np.abs(x - np.median(x))))


def decide(config: MonitorConfig, losses: Sequence[float], before: Probe, after: Probe, reference: Probe | None = None) -> Decision:
    """The verdict on a stage's first steps; `losses` has one training loss per step, including the skipped steps.

    `reference` is the probe at the length and with the scheme of the previous stage; without it, gains replace excesses.
    """
    found = curve(losses[config.skip :])
    statistics = {
        **dataclasses.asdict(found),
        "text_gain": 1 - after.text_loss / before.text_loss,
        "needle_gain": 1 - after.needle_loss / before.needle_loss,
        "needle_accuracy": after.needle_accuracy,
    }
    if reference is not None:
        statistics["text_excess"] = after.text_loss - reference.text_loss
        statistics["needle_excess"] = after.needle_loss - reference.needle_loss
    values = dataclasses.asdict(config)
    thresholds = {name: value for name, value in values.items() if name.startswith(("min_", "max_", "enough_"))}
    wrong = [*curve_faults(config, statistics), *probe_faults(config, statistics)]
    if wrong:
        return Decision("oscillating", "; ".join(wrong), statistics, thresholds)
    reason = (
        f"needle accuracy {statistics['needle_accuracy']:.0%}, needle gain {statistics['needle_gain']:.1%}, text gain "
        f"{statistics['text_gain']:.1%}; the loss goes up in {found.up_pairs:.0%} of step pairs"
    )
    return Decision("straight down", reason, statistics, thresholds)


def curve_faults(config: MonitorConfig, values: Mapping[str, float]) -> list[str]:
    """The faults in a stage's loss curve, one sentence each; empty when there are none."""
    # `not a >= b` rather than `a < b`, so that NaN is a fault.
    faults = []
    if not (values["straightness"] >= config.min_straightness or values["swing"] <= config.max_swing):
        faults.append(
            f"the loss swings by {values['swing']:.1f} times the noise of its batches, above {config.max_swing}, and its "
            f"straightness is {values['straightness']:.2f}, below {config.min_straightness}"
        )
    if not values["up_pairs"] <= config.max_up_pairs:
        faults.append(f"the loss goes up in {values['up_pairs']:.0%} of step pairs, more than {config.max_up_pairs:.0%}")
    return faults


def probe_faults(config: MonitorConfig, values: Mapping[str, float]) -> list[str]:
    """The faults in a stage's probe, one sentence each; empty when there are none."""
    faults = []
    if "text_excess" in values:
        if not values["text_excess"] <= config.max_text_excess:
            faults.append(
                f"held-out text is {values['text_excess']:.2f} nats above the previous stage, more than {config.max_text_excess}"
            )
    elif not values["text_gain"] >= config.min_text_gain:
        faults.append(f"held-out text gain {values['text_gain']:.1%} is below {config.min_text_gain:.1%}")
    if values["needle_accuracy"] >= config.enough_needle_accuracy:
        return faults
    if "needle_excess" in values:
        if not values["needle_excess"] <= config.max_needle_excess:
            faults.append(
                f"needles are {values['needle_excess']:.2f} nats above the previous stage, more than {config.max_needle_excess}"
            )
    elif not values["needle_gain"] >= config.min_needle_gain:
        faults.append(f"needle gain {values['needle_gain']:.1%} is below {config.min_needle_gain:.1%}")
    return faults


@flax.struct.dataclass
class ProbeSums:
    """Σ w·ℓ, Σ w and Σ w·correct over the text rows and the needle rows, float32 `[2]` each."""

    nll: jax.Array
    weight: jax.Array
    correct: jax.Array


@functools.partial(jax.jit, static_argnums=2)
def probe_sums(params: Tree, buffers: Mapping[str, Any], arch: Architecture, batch: Batch) -> ProbeSums:
    """Sums over a batch from `lcx.data.loader.probe`: text in the first half of its rows `[B, T]`, needles in the rest."""
    losses = token_losses(params, hidden_states(params, buffers, arch, batch), batch.targets, arch)
    rows = batch.tokens.shape[0]
    needle = (jnp.arange(rows) >= rows - rows // 2).astype(jnp.float32)
    halves = jnp.stack([1 - needle, needle])

    def both(x: jax.Array) -> jax.Array:
        return halves @ jnp.sum(x * batch.loss_weights, axis=1)

    return ProbeSums(both(losses.nll), both(jnp.ones_like(losses.nll)), both(losses.correct.astype(jnp.float32)))


def read_probe(sums: ProbeSums) -> Probe:
    """The probe's results from its sums, fetched from the device."""
    nll, weight, correct = (np.asarray(jax.device_get(x), np.float64) for x in (sums.nll, sums.weight, sums.correct))
    text, needle = nll / np.maximum(weight, 1.0)
    return Probe(float(text), float(needle), float(correct[1] / max(weight[1], 1.0)))
