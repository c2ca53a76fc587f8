"""Mean hidden states of texts against the same model's states one text at a time."""

import dataclasses

import jax
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.data.config import DataConfig
from lcx.data.curation.embed import EmbedConfig
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.model.transformer import hidden_states
from lcx.recipes import hidden
from lcx.recipes.hidden import HiddenStates
from lcx.training.loading import Loaded
from lcx.training.meta import Meta
from lcx.training.stages import RunConfig, StageConfig

LENGTH = 32
MODEL = ModelConfig(model_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=32)


@pytest.fixture(scope="module")
def loaded():
    positions = {"default": {"name": "rope", "theta": 100.0}}
    stage = StageConfig(name="only", seq_len=LENGTH, steps=1, batch_size=1, monitor=False)
    run = RunConfig(MODEL, (stage,), ExecutionConfig(attention="dense"), positions=positions, data=DataConfig(tokenizer="bytes"))
    meta = Meta(stage="only", stage_index=0, attempt=0, stage_step=0, step=0, length=LENGTH, seed=0, config="", positions=positions)
    found = Loaded(None, run, meta)
    return dataclasses.replace(
        found, params=initialize(specs(MODEL, build_schemes(MODEL, found.schemes), LENGTH), jax.random.key(0))
    )


def states_of(loaded, text):
    """States `[T, D]` of a text that fits, without padding."""
    schemes = build_schemes(MODEL, loaded.schemes)
    arch, buffers = build_architecture(MODEL, loaded.run.execution, schemes, LENGTH)
    tokens = np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.int32)[None]
    states = jax.jit(hidden_states, static_argnums=2)(loaded.params, buffers, arch, Batch.from_tokens(tokens))[0]
    return np.asarray(states[0], np.float64)


def test_the_mean_over_all_windows(loaded, monkeypatch):
    monkeypatch.setattr(hidden, "TOKENS_PER_FORWARD", 3 * LENGTH)
    long = "".join(chr(97 + i * i % 26) for i in range(71))
    texts = ["a river", "", long, "the sea", "one oak"]
    found = HiddenStates(loaded)(texts)
    assert found.shape == (5, 32) and found.dtype == np.float32 and not found[1].any()
    parts = {0: ["a river"], 2: [long[:32], long[32:64], long[64:]], 3: ["the sea"], 4: ["one oak"]}
    for place, pieces in parts.items():
        mean = np.concatenate([states_of(loaded, piece) for piece in pieces]).mean(0)
        assert np.allclose(found[place], mean / np.linalg.norm(mean), atol=1e-5)


def test_another_model_has_another_fingerprint(loaded):
    one = HiddenStates(loaded).fingerprint
    other = dataclasses.replace(loaded, params=jax.tree.map(lambda x: 1.5 * x, loaded.params))
    assert one == HiddenStates(loaded).fingerprint != HiddenStates(other).fingerprint


def test_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        hidden.embedder(EmbedConfig(model=f"{tmp_path}/nothing"))
