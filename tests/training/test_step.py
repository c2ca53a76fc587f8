"""One step is the same on every mesh, under every accumulation, and compiled once for every theta."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import initialize, paths_of
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import token_losses
from lcx.model.params import specs
from lcx.model.transformer import hidden_states
from lcx.positions.registry import from_config
from lcx.training.optimizer import OptimConfig
from lcx.training.step import TrainStep, train_step
from tests.compare import worst_error
from tests.quick import mostly_slow

ROWS, LENGTH, STEPS = 8, 48, 5
MODEL = ModelConfig(vocab_size=64, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, z_loss=1e-3)


def laid_out(theta=100.0, **execution):
    scheme = {"global": from_config({"name": "rope", "theta": theta})}
    arch, buffers = build_architecture(MODEL, ExecutionConfig(**execution), scheme, LENGTH)
    return arch, buffers, specs(MODEL, scheme, LENGTH)


def make_step(mesh, accumulate=1, **execution):
    arch, buffers, table = laid_out(**execution)
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * mesh.context]
    return train_step(arch, table, OPTIM, STEPS, make_mesh(mesh, devices), accumulate), buffers


def host_batch(step):
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (ROWS, LENGTH + 1))
    # Uneven weights: rows differ a hundredfold, so that averaging averages would show.
    weights = rng.random((ROWS, LENGTH + 1)).astype(np.float32) * (10.0 ** -(np.arange(ROWS) % 3))[:, None].astype(np.float32)
    return jax.tree.map(np.asarray, Batch.from_tokens(tokens, weights))


def fresh(step):
    return step.state_from_params(initialize(step.specs, jax.random.key(0)))


def run(step, buffers):
    """Losses and gradients of five steps, and the state after them."""
    state = fresh(step)
    losses, gradients = [], []
    for i in range(STEPS):
        state, metrics, grads = step.with_gradients(state, step.to_device(host_batch(i), ROWS), buffers)
        losses.append(metrics["loss"].item())
        gradients.append(jax.device_get(grads))
    return losses, gradients, state


@functools.cache
def reference():
    return run(*make_step(MeshConfig(fsdp=1)))[:2]


def check(losses, gradients):
    wanted = reference()
    np.testing.assert_allclose(losses, wanted[0], rtol=1e-6)
    for got, want in zip(gradients, wanted[1], strict=True):
        error, where = worst_error(got, want)
        assert error <= 1e-5, where


@pytest.mark.parametrize("sizes", mostly_slow([(8, 1, 1), (2, 4, 1), (2, 2, 2)], [(2, 2, 2)]))
def test_meshes_equal_one_device(sizes):
    data, fsdp, tensor = sizes
    step, buffers = make_step(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    losses, gradients, state = run(step, buffers)
    check(losses, gradients)
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)
    moments = next(part for part in state.opt_state if hasattr(part, "mu"))
    assert moments.mu["layers"]["mlp"]["up"]["kernel"].sharding == kernel.sharding


CONTEXT_MESHES = [(1, 1, 1, 6, 1)]
MORE_MESHES = [
    (1, 1, 1, 8, 1),
    (2, 1, 2, 2, 1),
    (1, 1, 1, 8, 2),
    (1, 2, 1, 4, 1),
    (1, 1, 1, 8, 4),
    (1, 2, 1, 4, 4),
    (2, 1, 2, 2, 2),
    (1, 1, 1, 6, 2),
]


@pytest.mark.parametrize(
    ("sizes", "strategy"),
    [
        *((sizes, "ring") for sizes in CONTEXT_MESHES),
        *(pytest.param(sizes, "ring", marks=pytest.mark.slow) for sizes in MORE_MESHES),
        *(pytest.param(sizes, "gather", marks=pytest.mark.slow) for sizes in ((1, 1, 1, 8, 2), (1, 2, 1, 4, 1))),
    ],
)
def test_context_meshes_equal_one_device(sizes, strategy):
    """Sequence, weights and optimizer state split over the devices of the context."""
    data, fsdp, tensor, context, ulysses = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, ulysses=ulysses)
    step, buffers = make_step(mesh, context_strategy=strategy)
    losses, gradients, state = run(step, buffers)
    check(losses, gradients)
    adam = next(x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    for tree in (state.params, adam.mu, adam.nu):
        kernel = tree["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * fsdp * tensor * context == kernel.size


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["offload", "nested_offload"])
def test_residuals_in_host_memory_on_a_context_mesh(remat):
    execution = dict(remat=remat, context_strategy="ring", attention="blockwise")
    execution |= {"remat_every": 2} if remat == "nested_offload" else {}
    check(*run(*make_step(MeshConfig(data=2, fsdp=1, context=4, ulysses=2), **execution))[:2])


TILED = {"attention": "blockwise", "context_strategy": "ring", "mlp_tile": 2, "loss_tile": 256}
"""Tiles of two tokens and of 256 logits: of a device's 6 tokens of a row, three and six."""
IN_SHARDS = [
    ((1, 1, 1, 8, 2), {"remat": "nested", "remat_every": 2, "head_groups": 1, **TILED}),
    ((1, 1, 1, 8, 1), {"remat": "block", "head_groups": 2, **TILED}),
    ((1, 1, 1, 4, 4), {"remat": "attention", "head_groups": 1, **TILED}),
    ((2, 1, 2, 2, 1), {"remat": "nested", "remat_every": 2, **TILED}),
    ((1, 2, 1, 4, 2), {"remat": "none", **TILED}),
    ((2, 1, 1, 4, 4), {"remat": "dots", **TILED}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_SHARDS, ids=lambda case: f"{case[0]}-{case[1]['remat']}")
def test_tiles_inside_shards_equal_one_device(case):
    """Layers and loss in tiles of each device's tokens, heads in groups, several periods of layers recomputed together."""
    (data, fsdp, tensor, context, ulysses), execution = case
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, ulysses=ulysses)
    check(*run(*make_step(mesh, **execution))[:2])


@pytest.mark.parametrize("accumulate", mostly_slow([2, 4], [4]))
def test_accumulation_equals_one_batch(accumulate):
    check(*run(*make_step(MeshConfig(fsdp=1), accumulate))[:2])


@pytest.mark.slow
def test_accumulation_on_a_mesh():
    check(*run(*make_step(MeshConfig(data=2, fsdp=2, tensor=2), 2))[:2])


ROW_PARTS = np.array([2, 0, 0, 1, 2, 2, 0, 1], np.int32)


def step_of(layout):
    (data, fsdp, context), accumulate = layout
    return make_step(MeshConfig(data=data, fsdp=fsdp, context=context), accumulate)


def with_parts(step):
    """A batch whose rows come from three of four parts, the fourth being absent."""
    return host_batch(step).replace(row_parts=ROW_PARTS, num_parts=4)


@functools.cache
def oracle():
    """Mean loss of each part, from the losses of all tokens on one device, summed in float64."""
    arch, buffers, table = laid_out()
    params, batch = initialize(table, jax.random.key(0)), host_batch(0)
    nll = token_losses(params, hidden_states(params, buffers, arch, batch)[0], batch.targets, arch).nll
    nll, weights = np.asarray(nll, np.float64), np.asarray(batch.loss_weights, np.float64)
    rows = [part == ROW_PARTS for part in range(4)]
    weight = [weights[own].sum() for own in rows]
    return [(nll[own] * weights[own]).sum() / w if w else np.nan for own, w in zip(rows, weight, strict=True)], weight


LOSSES_OF_PARTS = [((1, 1, 1), 1), ((1, 1, 1), 4), ((2, 2, 1), 2), ((2, 1, 4), 1), ((2, 1, 4), 2), ((1, 1, 8), 2)]
MOST = LOSSES_OF_PARTS[4]
"""Microbatches, devices that split the rows and devices that split each row at once."""


@pytest.mark.parametrize("layout", mostly_slow(LOSSES_OF_PARTS, [MOST]))
def test_loss_of_each_part(layout):
    """Over microbatches, devices that split the rows and devices that split each row."""
    step, buffers = step_of(layout)
    _, metrics = step(fresh(step), step.to_device(with_parts(0), ROWS), buffers)
    loss, weight = oracle()
    np.testing.assert_allclose(metrics["loss_by_part"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight_by_part"], weight, rtol=1e-6)
    whole = np.nansum(np.multiply(loss, weight)) / np.sum(weight)
    assert metrics["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_parts_change_no_other_number():
    step, buffers = make_step(MeshConfig(fsdp=1), 2)
    found = [step.with_gradients(fresh(step), step.to_device(make(0), ROWS), buffers) for make in (host_batch, with_parts)]
    (plain_state, plain, plain_grads), (state, metrics, grads) = jax.device_get(found)
    jax.tree.map(np.testing.assert_array_equal, (plain_state, plain_grads), (state, grads))
    assert {name: metrics[name] for name in plain} == plain


def test_a_part_that_is_not_finite_spoils_no_other():
    step, buffers = step_of(MOST)
    batch = with_parts(0)
    weights = batch.loss_weights.copy()
    weights[3, 5] = np.inf
    _, metrics = step(fresh(step), step.to_device(batch.replace(loss_weights=weights), ROWS), buffers)
    loss = np.asarray(metrics["loss_by_part"])
    assert not metrics["ok"] and np.isnan(loss[1])
    np.testing.assert_allclose(loss[[0, 2]], np.asarray(oracle()[0])[[0, 2]], rtol=1e-6)


def test_theta_compiles_nothing_again():
    arch, buffers, table = laid_out(theta=55.0)
    step = TrainStep(arch, tuple(paths_of(table)), OPTIM, STEPS, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    state = fresh(step)
    losses = []
    for theta in (55.0, 1e4, 5e8):
        other, buffers, _ = laid_out(theta)
        assert other == arch
        state, metrics = step(state, step.to_device(host_batch(0), ROWS), buffers)
        losses.append(metrics["loss"].item())
    assert step.compiles == 1
    assert len(set(losses)) == 3


@pytest.mark.parametrize("poison", ["weights", "none", "buffers"])
def test_a_step_that_is_not_finite_keeps_the_state(poison):
    step, buffers = make_step(MeshConfig(fsdp=1))
    state = fresh(step)
    state, metrics = step(state, step.to_device(host_batch(0), ROWS), buffers)
    assert metrics["ok"] and metrics["in_a_row"] == 0
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    batch = host_batch(1)
    if poison == "weights":
        batch = batch.replace(loss_weights=np.where(batch.loss_weights > 0.5, np.nan, batch.loss_weights).astype(np.float32))
    elif poison == "none":
        batch = batch.replace(loss_weights=np.zeros_like(batch.loss_weights))
    bad = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, buffers) if poison == "buffers" else buffers
    for count in (1, 2):
        state, metrics = step(state, step.to_device(batch, ROWS), bad)
        assert not metrics["ok"] and metrics["in_a_row"] == count and metrics["skipped"] == count
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, (state.params, state.opt_state)))
    state, metrics = step(state, step.to_device(host_batch(2), ROWS), buffers)
    assert metrics["ok"] and metrics["in_a_row"] == 0 and metrics["skipped"] == 2
    assert state.step == 4


def test_bfloat16_computes_on_float32_weights():
    step, buffers = make_step(MeshConfig(fsdp=1), 2, compute_dtype="bfloat16")
    state, metrics = step(fresh(step), step.to_device(host_batch(0), ROWS), buffers)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(metrics["loss"].item(), reference()[0][0], rtol=1e-2)
