"""A model's own mean hidden state as the vector of a document (`embedding.kind = "hidden"` of a curation).

Legend: B rows in one forward pass, T tokens, D model dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import Batch
from lcx.core.trees import Tree
from lcx.data.curation.embed import EmbedConfig, normalised
from lcx.data.tokenizers import tokenizers
from lcx.model.architecture import Architecture, build_architecture, build_schemes
from lcx.model.recurrent import hidden_states
from lcx.recipes import models
from lcx.recipes.recipe import backend_of
from lcx.training.loading import Loaded

WINDOW = 1024
"""Tokens that are read at once, or as many as the model was trained on if that is less."""
TOKENS_PER_FORWARD = 1 << 13


def embedder(config: EmbedConfig) -> HiddenStates:
    """What `lcx data curate` embeds with; raises `UserError` if `config.model` is no workdir, Hugging Face folder or GGUF file."""
    return HiddenStates(models.load(config.model))


class HiddenStates:
    """The mean of the last hidden states over all tokens of a text, which is read in windows."""

    kind = "hidden"

    def __init__(self, loaded: Loaded) -> None:
        run, self._params = loaded.run, loaded.params
        self._tokenizer = tokenizers.load(run.data.tokenizer)
        self._window = min(WINDOW, loaded.meta.length)
        self._rows = max(1, TOKENS_PER_FORWARD // self._window)
        schemes = build_schemes(run.model, loaded.schemes)
        self._arch, self._buffers = build_architecture(run.model, run.execution, schemes, self._window)
        weights = backend_of(loaded, self._window).fingerprint
        self.fingerprint = f"hidden:{weights} {self._tokenizer.fingerprint} {self._window}"

    def __call__(self, texts: Sequence[str], names: Sequence[str] = ()) -> np.ndarray:
        """Vectors float32 `[texts, D]` of length 1; zeros for a text without tokens."""
        sums: np.ndarray = np.zeros((len(texts), self._arch.config.model_dim))
        owners: list[int] = []
        rows: list[np.ndarray] = []
        for owner, text in enumerate(texts):
            tokens = self._tokenizer.encode(text)
            for at in range(0, len(tokens), self._window):
                owners.append(owner)
                rows.append(tokens[at : at + self._window])
                if len(rows) == self._rows:
                    self._add(sums, owners, rows)
        self._add(sums, owners, rows)
        return normalised(sums)

    def _add(self, sums: np.ndarray, owners: list[int], rows: list[np.ndarray]) -> None:
        """Add the states of some rows to those of their texts, and empty the lists. All calls have one shape."""
        if not rows:
            return
        tokens_BT = np.zeros((self._rows, self._window + 1), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
        lengths_B = np.array([*map(len, rows), *[0] * (self._rows - len(rows))], np.int32)
        found = np.asarray(_summed(self._params, self._buffers, jnp.asarray(tokens_BT), jnp.asarray(lengths_B), self._arch))
        for i, owner in enumerate(owners):
            sums[owner] += found[i]
        owners.clear()
        rows.clear()


@functools.partial(jax.jit, static_argnames="arch")
def _summed(params: Tree, buffers: Tree, tokens_BT: jax.Array, lengths_B: jax.Array, arch: Architecture) -> jax.Array:
    """Sums float32 `[B, D]` of the hidden states of the first `lengths_B` tokens; no state depends on what is behind it."""
    states_BTD = hidden_states(params, buffers, arch, Batch.from_tokens(tokens_BT)).astype(jnp.float32)
    inside_BT = jnp.arange(states_BTD.shape[1])[None] < lengths_B[:, None]
    return jnp.where(inside_BT[..., None], states_BTD, 0).sum(1)
