"""Scoring rows of tokens with a model: one compiled program per shape, whatever the frequencies.

Legend: R rows, B rows in one forward pass, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.core.batch import Batch
from lcx.core.mesh import context_size, mesh_of
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture, row_layout
from lcx.model.loss import token_losses
from lcx.model.transformer import hidden_states


class Scores(NamedTuple):
    """Per predicted token, each `[R, T]`: loss in nats (float32) and whether the token is the most likely one (boolean)."""

    nll: np.ndarray
    correct: np.ndarray


Scorer = Callable[[np.ndarray, int], Scores]
"""`(rows [B, T + 1], last)`: scores of the predictions of each row's last `last` tokens, `[B, last]`."""

ScorerFor = Callable[[int], Scorer]
"""The scorer for a declared length in tokens."""


@functools.partial(jax.jit, static_argnames=("arch", "last"))
def score(params: Tree, buffers: Tree, tokens: jax.Array, arch: Architecture, last: int) -> tuple[jax.Array, jax.Array]:
    """Loss and match of the last `last` predictions of rows `[B, T + 1]`; logits are made for these alone.

    Frequencies are in `buffers`, so a theta ladder and a zero-shot comparison of schemes of one form share the program. On a mesh
    that is set rows are split over its context as in training, and logits are made for all tokens.
    """
    batch = Batch.from_tokens(tokens)
    mesh = jax.sharding.get_abstract_mesh()
    if context_size() == 1:
        states = hidden_states(params, buffers, arch, batch)[0][:, -last:]
        losses = token_losses(params, states, batch.targets[:, -last:], arch)
        return losses.nll, losses.correct
    ring, layout = mesh.shape["ring"], row_layout(arch.config, arch.execution, batch.tokens.shape[1], mesh)
    batch = arrange(batch, layout, ring).replace(layout=layout)
    losses = token_losses(params, hidden_states(params, buffers, arch, batch)[0], batch.targets, arch)
    nll, correct = restore((losses.nll, losses.correct), layout, ring)
    return nll[:, -last:], correct[:, -last:]


def model_scorer(params: Tree, arch: Architecture, buffers: Tree) -> Scorer:
    """A scorer with `arch` and `buffers` of `build_architecture`, for the rows' length, on the mesh that the weights are on."""

    def run(rows: np.ndarray, last: int) -> Scores:
        with mesh_of(params):
            # Any layout can deal such a length. Tokens behind a row's end are seen by none before it.
            fill = -(rows.shape[1] - 1) % (2 * context_size()) if context_size() > 1 else 0
            rows = np.pad(rows, ((0, 0), (0, fill)))
            # With a small vocabulary the logits of all tokens cost less than compiling a program for each `last`.
            scored = rows.shape[1] - 1 if arch.config.vocab_size <= 1024 else last + fill
            scores = (fetch(x) for x in score(params, buffers, jnp.asarray(rows, jnp.int32), arch, scored))
        return Scores(*(x[:, x.shape[1] - fill - last : x.shape[1] - fill] for x in scores))

    return run


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, gathered from other hosts where they hold parts of it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def score_rows(scorer: Scorer, rows: np.ndarray, tokens_per_forward: int, last: int | None = None) -> Scores:
    """Scores of any number of rows `[R, T + 1]`, at most `tokens_per_forward` tokens (but at least one row) at a time.

    A group that is not full is filled up with copies of its first row, so that all passes at a length, for whatever purpose, have
    one shape and share one program.
    """
    count, length = rows.shape[0], rows.shape[1] - 1
    last = length if last is None else last
    group = max(1, tokens_per_forward // length)
    nll, correct = [], []
    for start in range(0, count, group):
        part = rows[start : start + group]
        real = len(part)
        part = np.concatenate([part, np.repeat(part[:1], group - real, axis=0)])
        scores = scorer(part, last)
        nll.append(scores.nll[:real])
        correct.append(scores.correct[:real])
    return Scores(np.concatenate(nll), np.concatenate(correct))
