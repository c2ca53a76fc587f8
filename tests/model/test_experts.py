"""Mixture of experts: what transformers computes, by either product, on every mesh, in training and in decoding."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import PADDING, Batch
from lcx.core.errors import UserError
from lcx.core.mask import visible_pairs
from lcx.core.mesh import MeshConfig, make_mesh, named_sharding
from lcx.core.param_spec import abstract, initialize
from lcx.core.trees import num_elements
from lcx.model import flops
from lcx.model.architecture import Architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.model.linear import outer_by_group
from lcx.model.loss import loss_sums
from lcx.model.mlp import mlp
from lcx.model.params import specs
from lcx.model.presets import FAMILIES
from lcx.model.transformer import cast_params, hidden_states
from lcx.training.optimizer import OptimConfig
from lcx.training.step import train_step
from tests.attention.test_ahead_tpu import chips
from tests.attention.test_ahead_tpu import pytestmark as needs_libtpu
from tests.compare import worst_error
from tests.model.decode_cases import build, by_chunks, furthest, place
from tests.model.decode_cases import forward as all_at_once
from tests.model.make_hf_experts import CASES, FIXTURES, D, E, F, K, problem, reference
from tests.quick import mostly_slow

T = 32
TINY = ModelConfig(
    model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16, num_experts=8, experts_per_token=2,
    router_aux_weight=0.1,
)  # fmt: skip
ONE_BY_ONE = ExecutionConfig(layer_unroll=1)
ROPE = {"default": "rope:theta=500"}
LAYER = ModelConfig(model_dim=D, num_layers=1, mlp_dim=F, num_experts=E, experts_per_token=K)
BOTH = pytest.mark.parametrize("matmul", ["dense", "ragged"])


def layer_weights():
    values, _ = problem()
    return {name: {"kernel": jnp.asarray(values[name])} for name in ("router", "up", "gate", "down")}


# Against transformers


def agrees(arch: Architecture, wanted: dict) -> None:
    values, mask = problem()
    x, cotangent = jnp.asarray(values["x"]), jnp.asarray(values["cotangent"])
    y, pull = jax.vjp(lambda params, x: mlp(params, x, arch)[0], layer_weights(), x)
    gradients, dx = pull(cotangent)
    found = {"y": y, "x": dx, **{name: gradients[name]["kernel"] for name in gradients}}
    for name, marks in (("balance", np.ones_like(mask)), ("balance, masked", mask)):
        found[name] = mlp(layer_weights(), x, arch, token_mask=jnp.asarray(marks > 0))[1]
    for name in wanted:
        want = np.asarray(wanted[name])
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5 * np.max(np.abs(want)), err_msg=name)


@pytest.mark.parametrize(
    ("name", "matmul"),
    [
        pytest.param(name, matmul, marks=[pytest.mark.slow] * (name == "mixtral" and matmul == "dense"))
        for name in CASES
        for matmul in ("dense", "ragged")
    ],
)
def test_a_layer_is_that_of_transformers(name, matmul):
    """Output, gradients of x and of every kernel, and the load-balancing loss with and without padding."""
    config = dataclasses.replace(LAYER, normalize_expert_weights=CASES[name])
    arch = Architecture(config, ExecutionConfig(expert_matmul=matmul), ())
    agrees(arch, json.loads(FIXTURES.read_text())[name])
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        agrees(arch, reference(name))


# One product against the other

ROUTERS = {
    "even": lambda router: router,
    "all to one": lambda router: router.at[:, 2].add(100.0),
    "none to the last": lambda router: router.at[:, -1].add(-100.0),
}


@pytest.mark.parametrize(
    ("name", "chosen"), [("even", 2), ("even", 8), ("all to one", 1), ("all to one", 2), ("none to the last", 2)]
)
def test_sorted_tokens_give_what_all_experts_on_all_tokens_give(name, chosen):
    config = dataclasses.replace(TINY, experts_per_token=chosen, gated=chosen != 8)
    table = specs(config, build_schemes(config, ROPE), T)["layers"]["mlp"]
    params = jax.tree.map(lambda w: w[0], initialize(table, jax.random.key(0)))
    params["router"]["kernel"] = ROUTERS[name](params["router"]["kernel"])
    # Positive, so that a column of the router that is larger than the others is so for every token.
    x = jnp.abs(jax.random.normal(jax.random.key(1), (2, 10, config.model_dim)))

    def run(matmul, params, x):
        arch = Architecture(config, ExecutionConfig(expert_matmul=matmul), ())
        y, balance = mlp(params, x, arch, token_mask=jnp.ones((2, 10), bool))
        return jnp.sum(jnp.sin(y)) + balance, (y, balance)

    (got, want) = (
        jax.jit(jax.value_and_grad(functools.partial(run, matmul), argnums=(0, 1), has_aux=True))(params, x)
        for matmul in ("ragged", "dense")
    )
    assert worst_error(got, want)[0] <= 1e-5
    used = np.abs(np.asarray(want[1][0]["down"]["kernel"])).sum((1, 2)) > 0
    if name == "all to one":
        # It has all of the probability, so that whoever is chosen beside it gets no weight.
        assert used[2] and used.sum() == 1
        np.testing.assert_allclose(want[0][1][1], config.num_experts, rtol=1e-5)
    if name == "none to the last":
        assert not used[-1] and used.sum() > chosen


def test_rows_of_a_group_are_summed_by_the_kernel_for_tpus():
    x, dy = (jax.random.normal(jax.random.key(i), (300, size)) for i, size in enumerate((64, 96)))
    sizes = np.array([0, 130, 7, 0, 100])
    ends = np.cumsum(sizes)
    want = np.stack([np.asarray(x[end - n : end], np.float64).T @ dy[end - n : end] for end, n in zip(ends, sizes, strict=True)])
    got = outer_by_group(x, dy, jnp.asarray(sizes, jnp.int32), interpret=True)
    np.testing.assert_allclose(got, want, atol=2e-5)


# A whole model


def tokens(rows: int = 8, seed: int = 0) -> Batch:
    batch = Batch.from_tokens(np.random.default_rng(seed).integers(0, 256, (rows, T + 1)))
    # Padding of another length in each row: it is routed, and must not count in the balance.
    padded = np.arange(T)[None] >= T - np.arange(rows)[:, None]
    return batch.replace(segments=jnp.where(padded, PADDING, batch.segments), loss_weights=batch.loss_weights * ~padded)


@functools.partial(jax.jit, static_argnums=2)
def losses_and_gradients(params, buffers, arch, batch):
    def loss(params):
        states, router_aux = hidden_states(params, buffers, arch, batch)
        sums = loss_sums(params, states, batch, arch, router_aux)
        return sums.nll + sums.router_aux, sums

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def one_device(**changes):
    params, buffers, arch, _ = build(TINY, ROPE, T, dataclasses.replace(ONE_BY_ONE, **changes))
    return jax.device_get(losses_and_gradients(params, buffers, arch, tokens()))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"remat": "block", "expert_matmul": "ragged"}, marks=pytest.mark.slow),
        pytest.param({"layer_unroll": 2, "mlp_tile": T // 4}, marks=pytest.mark.slow),
        pytest.param({"remat": "attention", "attention": "blockwise"}, marks=pytest.mark.slow),
        pytest.param({"mlp_tile": T // 4, "expert_matmul": "ragged"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_gradient(changes):
    assert worst_error(one_device(**changes), one_device())[0] <= 1e-5


MESHES = {
    "expert=2 x fsdp=2 x tensor=2": (MeshConfig(fsdp=2, expert=2, tensor=2), "ragged"),
    "expert=2 x ring=2 x ulysses=2": (MeshConfig(fsdp=1, expert=2, context=4, ulysses=2), "ragged"),
    "expert=2 x ring=4, dense": (MeshConfig(fsdp=1, expert=2, context=4), "dense"),
    "expert=4 x data=2": (MeshConfig(data=2, fsdp=1, expert=4), "ragged"),
    "expert=8": (MeshConfig(fsdp=1, expert=8), "ragged"),
    "expert=4 x fsdp=2, dense": (MeshConfig(fsdp=2, expert=4), "dense"),
    "fsdp=2 x tensor=2 x ring=2": (MeshConfig(fsdp=2, tensor=2, context=2), "ragged"),
}
QUICK = tuple(MESHES)[:1]


@pytest.mark.parametrize("name", mostly_slow(MESHES, QUICK))
def test_meshes_equal_one_device(name):
    sizes, matmul = MESHES[name]
    params, buffers, arch, table = build(
        TINY, ROPE, T, dataclasses.replace(ONE_BY_ONE, expert_matmul=matmul, context_strategy="ring")
    )
    split, mesh = place(params, table, sizes)
    with jax.set_mesh(mesh):
        got = jax.device_get(losses_and_gradients(split, buffers, arch, tokens()))
    assert worst_error(got, one_device())[0] <= 1e-5
    kernel = split["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.size == kernel.size * sizes.data


@BOTH
def test_rows_that_the_mesh_cannot_split(matmul):
    """Three rows on an expert axis of four, as in decoding: all devices have all tokens, and each its own experts."""
    arch = Architecture(LAYER, ExecutionConfig(expert_matmul=matmul), ())
    x = jax.random.normal(jax.random.key(0), (3, 1, D))

    @jax.jit
    def run(params, x):
        return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(mlp(params, x, arch)[0])))(params)

    want = run(layer_weights(), x)
    mesh = make_mesh(MeshConfig(fsdp=1, expert=4, tensor=2))
    with jax.set_mesh(mesh):
        got = run(jax.device_put(layer_weights(), named_sharding(mesh, ())), x)
    assert worst_error(jax.device_get(got), jax.device_get(want))[0] <= 1e-5


@pytest.mark.slow
def test_decoding_on_a_mesh_equals_the_whole_forward_pass():
    params, buffers, arch, table = build(TINY, ROPE, T, dataclasses.replace(ONE_BY_ONE, expert_matmul="ragged"))
    prompts = [np.arange(9) * 5 % 256, np.arange(17) * 11 % 256]
    split, mesh = place(params, table, MeshConfig(fsdp=1, expert=2, context=2))
    with jax.set_mesh(mesh):
        new = generate(split, buffers, arch, prompts, 5, chunk=8)
        rows = [np.concatenate(pair) for pair in zip(prompts, new, strict=True)]
        found = by_chunks(split, buffers, arch, rows, 8, 5)
    wanted = all_at_once(params, buffers, arch, rows)
    assert furthest(found, wanted) <= 1e-5
    for one, tail in zip(wanted, new, strict=True):
        np.testing.assert_array_equal(np.argmax(one[-6:-1], axis=-1), tail)


@pytest.mark.parametrize("matmul", mostly_slow(["dense", "ragged"], ["ragged"]))
def test_bfloat16_layers_route_as_float32_layers(matmul):
    low, high = (
        Architecture(LAYER, execution, ())
        for execution in (ExecutionConfig(compute_dtype="bfloat16", expert_matmul=matmul), ExecutionConfig())
    )
    # What bfloat16 holds exactly, but for the router.
    values = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), layer_weights())
    params = {"layers": {"mlp": {**values, "router": layer_weights()["router"]}}}
    cast = cast_params(params, low)["layers"]["mlp"]
    assert (cast["router"]["kernel"].dtype, cast["up"]["kernel"].dtype) == (jnp.float32, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 16, D)).astype(jnp.bfloat16)
    token_mask = jnp.ones((2, 16), bool)
    got, balance = mlp(cast, x, low, token_mask=token_mask)
    want, exact = mlp(params["layers"]["mlp"], x.astype(jnp.float32), high, token_mask=token_mask)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02 * float(jnp.max(jnp.abs(want))))
    np.testing.assert_allclose(balance, exact, rtol=1e-6)


# A training step


def make_step(config: ModelConfig, mesh: MeshConfig, accumulate: int = 1, steps: int = 30, execution: ExecutionConfig = ONE_BY_ONE):
    params, buffers, arch, table = build(config, ROPE, T, execution)
    devices = jax.devices()[: mesh.fsdp * mesh.expert]
    step = train_step(arch, table, OptimConfig(lr=3e-3), steps, make_mesh(mesh, devices), accumulate)
    return step, step.state_from_params(params), buffers


@pytest.mark.slow
def test_the_balance_has_a_denominator_of_its_own():
    """Its gradient does not depend on the loss weights, and microbatches count by their tokens that are no padding."""
    batch = jax.tree.map(np.asarray, tokens())
    batch = batch.replace(loss_weights=batch.loss_weights * 0.01)
    step, state, buffers = make_step(TINY, MeshConfig(fsdp=1, expert=2), accumulate=2)
    _, metrics, gradients = step.with_gradients(state, step.to_device(batch, 8), buffers)
    params, _, arch, _ = build(TINY, ROPE, T, ONE_BY_ONE)

    def loss(params):
        nll = balance = 0.0
        for i in range(2):
            half = jax.tree.map(lambda x, i=i: x[i::2], batch)
            states, router_aux = hidden_states(params, buffers, arch, half)
            nll += loss_sums(params, states, half, arch).nll / np.sum(batch.loss_weights)
            balance += router_aux * np.sum(half.segments != PADDING) / np.sum(batch.segments != PADDING)
        return nll + TINY.router_aux_weight * balance, balance

    (_, balance), want = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(metrics["router_aux_loss"], balance, rtol=1e-6)
    assert worst_error(jax.device_get(gradients), want)[0] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("matmul", ["dense", "ragged"])
def test_training_lowers_loss_and_balance(matmul):
    config, execution = dataclasses.replace(TINY, router_aux_weight=1.0), dataclasses.replace(ONE_BY_ONE, expert_matmul=matmul)
    step, state, buffers = make_step(config, MeshConfig(fsdp=1), execution=execution)
    batch = step.to_device(jax.tree.map(np.asarray, tokens()), 8)
    rows = []
    for _ in range(30):
        state, metrics = step(state, batch, buffers)
        rows.append((metrics["loss"].item(), metrics["router_aux_loss"].item()))
    assert rows[-1][0] < rows[0][0] - 1.0
    assert 2.0 <= rows[-1][1] < rows[0][1]


def test_a_weight_of_zero_computes_no_balance():
    free = dataclasses.replace(TINY, router_aux_weight=0.0)
    params, buffers, arch, _ = build(free, ROPE, T, ONE_BY_ONE)
    assert jax.eval_shape(lambda *x: hidden_states(*x[:2], arch, x[2]), params, buffers, tokens())[1] is None
    step, state, buffers = make_step(free, MeshConfig(fsdp=1))
    with jax.set_mesh(step.mesh):
        _, metrics = jax.eval_shape(step._train, state, tokens(), buffers)
    assert "router_aux_loss" not in metrics


# Figures and refusals


def test_flops_are_those_of_the_chosen_experts():
    config = dataclasses.replace(TINY, router_aux_weight=0.0)
    execution = dataclasses.replace(ONE_BY_ONE, attention="dense", expert_matmul="ragged")
    params, buffers, arch, _ = build(config, ROPE, T, execution)

    def loss(params, batch):
        return loss_sums(params, hidden_states(params, buffers, arch, batch)[0], batch, arch).nll

    # Dense attention computes all T * T pairs of every head, the formula charges the T(T+1)/2 that are visible.
    unseen = 4 * config.num_layers * config.num_heads * config.head_dim * (T * T - visible_pairs(T, None))
    assert flops.count(loss, params, tokens(2)) == 2 * (flops.forward_flops(config, 1, T) + unseen)


def test_flops_of_a_backward_pass_are_twice_the_forward_pass():
    rows, kernels, sizes = jnp.ones((12, 4)), jnp.ones((3, 4, 5)), jnp.array([4, 0, 8])

    def product(rows, kernels):
        return jax.lax.ragged_dot(rows, kernels, sizes)

    assert flops.count(product, rows, kernels) == 2 * 12 * 4 * 5
    assert flops.count(lambda *x: jax.vjp(product, *x)[1](jnp.ones((12, 5))), rows, kernels) == 3 * 2 * 12 * 4 * 5


@pytest.mark.parametrize(("name", "billions", "active"), [("mixtral_8x7b", 46.7, 12.9), ("qwen3_30b_a3b", 30.5, 3.3)])
def test_presets_have_the_published_sizes(name, billions, active):
    """Parameters in all and for each token, as the model cards give them."""
    config = FAMILIES[name].model
    table = specs(config, build_schemes(config, FAMILIES[name].positions), 8)
    experts = {key: kernel for key, kernel in abstract(table)["layers"]["mlp"].items() if key != "router"}
    total, idle = num_elements(abstract(table)), 1 - config.experts_per_token / config.num_experts
    assert total / 1e9 == pytest.approx(billions, abs=0.05)
    assert (total - idle * num_elements(experts)) / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "model.num_experts=0 must be above 0"),
        ({"experts_per_token": 9}, "model.experts_per_token=9 is above model.num_experts=8; lower it"),
        ({"router_aux_weight": -1.0}, "model.router_aux_weight=-1.0 must not be negative"),
        ({"num_experts": None}, "model.router_aux_weight=0.1 balances experts; set model.num_experts too"),
        ({"mlp_bias": True}, "model.mlp_bias=True is not supported with model.num_experts"),
    ],
    ids=str,
)
def test_what_makes_no_mixture_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes)


# Compiled ahead for TPUs


@pytest.mark.slow
@needs_libtpu
def test_tpus_compute_the_chosen_experts_only():
    """XLA counts the rows of the grouped products once, forward and backward, where K of E experts are chosen."""
    config = dataclasses.replace(TINY, model_dim=256, mlp_dim=256, num_experts=16)
    arch = Architecture(config, dataclasses.replace(ONE_BY_ONE, compute_dtype="bfloat16"), ())
    mesh = make_mesh(MeshConfig(fsdp=1), chips("v5p:2x2x1")[:1])
    table = specs(dataclasses.replace(config, num_layers=1), build_schemes(config, ROPE), T)["layers"]["mlp"]

    def shape(spec, axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(spec, dtype, sharding=named_sharding(mesh, axes))

    params = jax.tree.map(lambda w: shape(w.shape[1:], (None,) * (len(w.shape) - 1)), abstract(table))
    x = shape((1, 1024, 256), ("batch", "sequence", None))

    def run(params, x):
        return jnp.sum(mlp(params, x, arch)[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(run, argnums=(0, 1))).lower(params, x).compile()
    chosen = 3 * 2 * 1024 * 2 * 3 * 256 * 256
    assert chosen <= compiled.cost_analysis()["flops"] <= 1.2 * chosen
