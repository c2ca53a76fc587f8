"""DoReMi's weights of domains (Xie et al., arXiv:2305.10429, algorithm 1): more for what a small model can still learn.

A reference is trained on some mixture. A proxy of the same size is trained on rows of all domains alike, and at each step a
domain's weight grows with its excess: how far the proxy's losses lie above the reference's. Text that both know has none, noise
that neither can learn little. The result is the average of the weights over the steps.

Legend: B batch rows, T tokens in a row, P domains (parts of a mixture).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import Batch
from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture
from lcx.model.loss import sums_by_part, token_losses
from lcx.model.recurrent import hidden_states


@dataclasses.dataclass(frozen=True)
class DoReMiConfig:
    """`step_size` η of the exponentiated gradient, and `smoothing` ε, the share that is spread over all domains at each update."""

    step_size: float = 1.0
    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        positive("doremi", step_size=self.step_size)
        if not 0 <= self.smoothing < 1:
            raise UserError(f"doremi.smoothing={self.smoothing} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class DomainWeights:
    """Weights after `updates` updates, float64 `[P]` each: `now` and the `mean` over the updates sum to 1; `excess` in nats is each
    domain's latest."""

    now: np.ndarray
    excess: np.ndarray
    mean: np.ndarray
    updates: int

    @classmethod
    def uniform(cls, domains: int) -> "DomainWeights":
        """Before the first update."""
        return cls(np.full(domains, 1 / domains), np.zeros(domains), np.zeros(domains), 0)


def update(before: DomainWeights, excess: np.ndarray, config: DoReMiConfig) -> DomainWeights:
    """The weights after one step's `excess` `[P]` of `excess_by_part`, which is not finite for domains that it has no tokens of.

    log α ← log α + η·λ, normalised, then α ← (1 - ε)·α + ε/P. An absent domain keeps its last λ, which counts again.
    """
    latest = np.where(np.isfinite(excess), np.asarray(excess, np.float64), before.excess)
    logits = np.log(np.maximum(before.now, np.finfo(np.float64).tiny)) + config.step_size * latest
    grown = np.exp(logits - logits.max())
    now = (1 - config.smoothing) * grown / grown.sum() + config.smoothing / len(grown)
    updates = before.updates + 1
    return DomainWeights(now, latest, before.mean + (now - before.mean) / updates, updates)


def excess_by_part(proxy_nll: jax.Array, reference_nll: jax.Array, batch: Batch) -> jax.Array:
    """The excess λ of each part, float32 `[P]`: the mean over its tokens with a loss weight of max(proxy - reference, 0).

    Both losses are `[B, T]` in nats. Tokens are clipped before they are averaged. NaN for a part without tokens.
    """
    counted = batch.loss_weights > 0
    clipped = jnp.where(counted, jnp.maximum(proxy_nll - reference_nll, 0.0), 0.0)
    tokens = counted.astype(jnp.float32)
    return sums_by_part(clipped, batch.row_parts, batch.num_parts) / sums_by_part(tokens, batch.row_parts, batch.num_parts)


@functools.partial(jax.jit, static_argnums=4)
def measure(proxy: Tree, reference: Tree, buffers: Mapping[str, Any], batch: Batch, arch: Architecture) -> jax.Array:
    """`excess_by_part` of two sets of parameters of one architecture, whose mesh is set."""

    def nll(params: Tree) -> jax.Array:
        return token_losses(params, hidden_states(params, buffers, arch, batch), batch.targets, arch).nll

    return excess_by_part(nll(proxy), nll(reference), batch)
