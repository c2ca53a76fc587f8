"""A tiny random model over bytes that reads documents."""

import dataclasses

import jax

from lcx.core.param_spec import initialize
from lcx.data.config import DataConfig
from lcx.model.architecture import build_schemes
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.recipes.reader import Reader
from lcx.training.loading import Loaded
from lcx.training.meta import Meta
from lcx.training.stages import RunConfig, StageConfig
from tests.model.numpy_decoder import MODEL, THETA

LENGTH = 256


def reader(seed: int = 0, tokens_per_forward: int = 1024) -> Reader:
    config = dataclasses.replace(MODEL, num_layers=2)
    stage = StageConfig(name="only", seq_len=LENGTH, steps=1, batch_size=1, monitor=False)
    positions = {"default": {"name": "rope", "theta": THETA}}
    run = RunConfig(config, (stage,), ExecutionConfig(attention="dense"), positions=positions, data=DataConfig(tokenizer="bytes"))
    meta = Meta(
        stage="only", stage_index=0, attempt=0, stage_step=0, step=0, length=LENGTH, seed=0, config="", positions=positions
    )  # fmt: skip
    loaded = Loaded(None, run, meta)
    # Larger weights than a model begins with, so that attention and losses differ from place to place.
    params = initialize(specs(config, build_schemes(config, loaded.schemes), LENGTH), jax.random.key(seed))
    params = jax.tree.map(lambda x: 2.5 * x if x.ndim > 1 else x, params)
    return Reader(dataclasses.replace(loaded, params=params), f"model {seed}", tokens_per_forward)
