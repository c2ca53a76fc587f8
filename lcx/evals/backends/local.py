"""A model of lcx as an evaluation's backend: one compiled program per shape, whatever the frequencies.

Legend: B rows in one forward pass, T tokens, A answer tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.core.batch import Batch
from lcx.core.mesh import context_size, mesh_of
from lcx.core.trees import Tree
from lcx.evals.base import Item, Scores
from lcx.model.architecture import Architecture, build_architecture, row_layout
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import token_losses
from lcx.model.transformer import hidden_states
from lcx.positions.scheme import Scheme


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


class LocalBackend:
    """A model of lcx under `schemes` (by layer kind), laid out for `length` tokens, on the mesh that its weights are placed on.

    At most `tokens_per_forward` tokens, but at least one row, are processed at a time.
    """

    def __init__(
        self,
        params: Tree,
        config: ModelConfig,
        execution: ExecutionConfig,
        schemes: Mapping[str, Scheme],
        length: int,
        tokens_per_forward: int = 1 << 14,
    ) -> None:
        self._params, self._length = params, length
        self._group = max(1, tokens_per_forward // length)
        self._arch, self._buffers = build_architecture(config, execution, schemes, length)

    def loglikelihood(self, items: Sequence[Item]) -> list[Scores]:
        """Scores `[A]` of each item's answer.

        Rows are padded behind their end, which no token before it sees, so that all passes at a length, for whatever task, have
        one shape and share one program; a group that is not full is filled up with copies of its first row.
        """
        found = []
        # With a small vocabulary the logits of all tokens cost less than compiling a program for each number of them.
        whole = self._arch.config.vocab_size <= 1024
        last = self._length if whole else self._length + 1 - min(len(item.prompt) for item in items)
        for group in self._groups(items):
            rows = np.zeros((self._group, self._length + 1), np.int32)
            for row, item in zip(rows, group, strict=False):
                row[: len(item.prompt)], row[len(item.prompt) : len(item.prompt) + len(item.answer)] = item.prompt, item.answer
            rows[len(group) :] = rows[0]
            scores = self._score(rows, last)
            for i, item in enumerate(group):
                first = len(item.prompt) - 1 - (self._length - last)
                found.append(Scores(*(x[i, first : first + len(item.answer)] for x in scores)))
        return found

    def generate(self, items: Sequence[Item], new_tokens: int) -> list[np.ndarray]:
        """`new_tokens` tokens after each prompt, greedily."""
        out: list[np.ndarray] = []
        with mesh_of(self._params):
            for group in self._groups(items):
                out += list(generate(self._params, self._buffers, self._arch, [item.prompt for item in group], new_tokens))
        return out

    def _groups(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[first : first + self._group] for first in range(0, len(items), self._group)]

    def _score(self, rows: np.ndarray, last: int) -> tuple[np.ndarray, ...]:
        """Loss and match `[B, last]` of the last predictions of rows `[B, T + 1]`."""
        with mesh_of(self._params):
            # Any layout can deal such a length.
            fill = -(rows.shape[1] - 1) % (2 * context_size()) if context_size() > 1 else 0
            rows = jnp.asarray(np.pad(rows, ((0, 0), (0, fill))))
            scores = [fetch(x) for x in score(self._params, self._buffers, rows, self._arch, last + fill)]
        return tuple(x[:, : x.shape[1] - fill] for x in scores)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, gathered from other hosts where they hold parts of it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
