"""Schedules at their corners, what decays, and each optimizer of the table in the real step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import abstract, paths_of
from lcx.core.trees import paths
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.positions.registry import from_config
from lcx.training.optimizer import OptimConfig, check_patterns, decay_mask, groups, learning_rate, optimizer
from lcx.training.optimizers.table import OPTIMIZERS
from lcx.training.step import TrainStep
from tests.quick import mostly_slow


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
    ours, peer = optimizer(config, 10, {}), optax.adamw(0.1, config.b1, config.b2, config.eps, weight_decay=0.01)
    got, _ = ours.update(grads, ours.init(params), params, step=jnp.int32(0))
    want, _ = peer.update(grads, peer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_impossible_values():
    for values in ({"lr": 0.0}, {"end_fraction": 2.0}, {"b1": 1.0}, {"warmup_steps": -1}):
        with pytest.raises(UserError, match=next(iter(values))):
            OptimConfig(**values)


MODEL = ModelConfig(vocab_size=32, model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)


def trained(config, steps=8, devices=1):
    """Losses of `steps` steps on one batch, with the parameters before and after and the optimizer state."""
    schemes = {"global": from_config({"name": "rope", "theta": 100.0})}
    arch, buffers = build_architecture(MODEL, ExecutionConfig(), schemes, 16)
    mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    step = TrainStep(arch, tuple(paths_of(specs(MODEL, schemes, 16))), config, steps, mesh)
    state = step.init_state(jax.random.key(0))
    before, losses = jax.tree.map(np.asarray, state.params), []
    tokens = np.random.default_rng(0).integers(0, 32, (4, 16)).astype(np.int32)
    batch = step.to_device(jax.tree.map(np.asarray, Batch.from_tokens(tokens)), 4)
    for _ in range(steps):
        state, metrics = step(state, batch, buffers)
        losses.append(metrics["loss"].item())
    return losses, before, state


RATES = {"adamw": 1e-2, "muon": 1e-2, "adafactor": 3e-2, "lion": 2e-3}


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, ["lion"]))
def test_each_optimizer_learns(name):
    losses, _, _ = trained(OptimConfig(name=name, lr=RATES[name]))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_mesh_equals_one_device(name):
    config = OptimConfig(name=name, lr=1e-2)
    np.testing.assert_allclose(trained(config, 3)[0], trained(config, 3, devices=2)[0], rtol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, ["adafactor"]))
def test_frozen_parameters_stay_and_have_no_state(name):
    _, before, after = trained(OptimConfig(name=name, freeze=("embed", "attention/query")), 3)
    for (path, old), new in zip(paths(before), jax.tree.leaves(after.params), strict=True):
        still = path.startswith("embed") or "attention/query" in path
        assert np.array_equal(old, new) == still, path
    assert not [path for path, _ in paths(after.opt_state) if "embed/embedding" in path or "query" in path]


def test_a_factor_on_the_learning_rate():
    config = OptimConfig(lr=0.1, schedule="constant", lr_scale=(("head", 0.5), ("h", 3.0)), decay_exclude=("head",), clip_norm=None)
    params = {name: {"kernel": jnp.ones((3, 2))} for name in ("body", "head", "hidden")}
    grads = jax.tree.map(lambda x: 2 * x, params)
    transform = optimizer(config, 10, {})
    got, _ = transform.update(grads, transform.init(params), params, step=jnp.int32(0))
    np.testing.assert_allclose([got[name]["kernel"][0, 0] for name in params], [-0.11, -0.05, -0.33], rtol=1e-5)


def test_groups_say_what_becomes_of_each_parameter():
    params = abstract(specs(MODEL, {"global": from_config({"name": "rope", "theta": 100.0})}, 16))
    config = OptimConfig(lr=0.01, lr_scale=(("query", 0.5),), decay_exclude=("mlp/up",), freeze=("embed",), weight_decay=0.1)
    found = groups(config, None, params)
    assert sorted(path for group in found for path in group.paths) == sorted(path for path, _ in paths(params))
    by_path = {path: (group.lr, group.weight_decay) for group in found for path in group.paths}
    assert by_path["embed/embedding"] == (0.0, 0.0)
    assert by_path["layers/attention/query/kernel"] == (0.005, 0.1) and by_path["layers/mlp/gate/kernel"] == (0.01, 0.1)
    assert by_path["layers/mlp/up/kernel"] == by_path["final_norm/scale"] == (0.01, 0.0)
    assert "frozen: embed/embedding (512)" in map(str, found)
    assert "lr 0.005, decay 0.1: layers/attention/query/kernel (512)" in map(str, found)


def test_patterns_that_cannot_work():
    params = abstract(specs(MODEL, {"global": from_config({"name": "rope", "theta": 100.0})}, 16))
    with pytest.raises(UserError, match="matches no parameter; did you mean 'layers/attention/query/kernel'"):
        check_patterns(OptimConfig(freeze=("layers/atention/query/kernel",)), params)
    with pytest.raises(UserError, match="freezes all parameters"):
        check_patterns(OptimConfig(freeze=(".",)), params)
    with pytest.raises(UserError, match=r"optim.decay_exclude: '\(' is not a regular expression"):
        OptimConfig(decay_exclude=("(",))
    with pytest.raises(UserError, match="did you mean 'muon'"):
        OptimConfig(name="muom")
