"""Schedules at their corners, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcx.core.errors import UserError
from lcx.core.param_spec import abstract
from lcx.core.trees import paths
from lcx.model.config import ModelConfig
from lcx.model.params import specs
from lcx.positions.registry import from_config
from lcx.training.optimizer import OptimConfig, decay_mask, learning_rate, optimizer


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1)]
)
def test_schedules(schedule, middle, end):
    rate = learning_rate(OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10), 110)
    np.testing.assert_allclose([rate(i) for i in (0, 4, 9, 10)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate(60), middle, rtol=1e-6)
    np.testing.assert_allclose(rate(110), end, rtol=1e-5)


def test_wsd_falls_over_its_last_part():
    rate = learning_rate(OptimConfig(lr=1.0, schedule="wsd", decay_fraction=0.2, end_fraction=0.0), 100)
    np.testing.assert_allclose([rate(i) for i in (79, 80, 90, 100)], [1, 1, 0.5, 0], atol=1e-6)


def test_matrices_decay_and_nothing_else():
    model = ModelConfig(num_layers=2, qkv_bias=True, qk_norm="head", sinks=True, post_norm=True)
    table = specs(model, {"global": from_config({"name": "rope", "theta": 100.0})}, 64)
    decays = {path for path, value in paths(decay_mask(abstract(table))) if value}
    assert decays == {path for path, _ in paths(abstract(table)) if path.endswith(("kernel", "embedding"))}


def test_equals_adamw():
    config = OptimConfig(lr=0.1, schedule="constant", weight_decay=0.01, clip_norm=None)
    params = {"a": {"kernel": jnp.ones((3, 2))}}
    grads = {"a": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
    ours, peer = optimizer(config, 10), optax.adamw(0.1, config.b1, config.b2, config.eps, weight_decay=0.01)
    got, _ = ours.update(grads, ours.init(params), params, step=jnp.int32(0))
    want, _ = peer.update(grads, peer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_impossible_values():
    for values in ({"lr": 0.0}, {"end_fraction": 2.0}, {"b1": 1.0}, {"warmup_steps": -1}):
        with pytest.raises(UserError, match=next(iter(values))):
            OptimConfig(**values)
