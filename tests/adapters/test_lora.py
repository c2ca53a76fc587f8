"""Adapters against their formulas in float64, folded against unfolded, and what cannot be adapted."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.adapters import lora
from lcx.adapters.freeze import join, split
from lcx.adapters.lora import LoraConfig
from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import initialize
from lcx.core.quantized import dense, is_quantized
from lcx.core.trees import num_bytes, paths
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.linear import linear
from lcx.model.loss import logits
from lcx.model.params import specs
from lcx.model.transformer import hidden_states
from lcx.positions.registry import from_config
from lcx.training.optimizer import OptimConfig
from lcx.training.step import train_step
from tests.compare import worst_error
from tests.quick import mostly_slow

MODEL = ModelConfig(
    vocab_size=64, model_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32, qkv_bias=True, qk_norm="head"
)
EXPERTS = dataclasses.replace(MODEL, num_experts=4, experts_per_token=2)
SCHEMES = {"global": from_config({"name": "rope", "theta": 100.0})}
ALL = LoraConfig(rank=4, alpha=6.0, targets=("kernel", "embed"), ranks=(("mlp", 3),), alphas=(("key", 2.0),))
ROWS, LENGTH = 8, 48


def tree(config, model=MODEL, seed=0):
    """Random parameters in which every adapter does something."""
    table = lora.specs(specs(model, SCHEMES, LENGTH), config, model.tied_embeddings)
    found = lora.start(initialize(table, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), jnp.float32) if path.endswith(("/a", "/b")) else leaf
        for path, leaf in paths(found)
    }
    flat |= {path: leaf * 1.3 for path, leaf in flat.items() if path.endswith("/magnitude")}
    return jax.tree.unflatten(jax.tree.structure(found), list(flat.values()))


def smaller(params):
    """With smaller changes, so that outputs are of the size of a model's."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x * 0.3 if path[-1].key in ("a", "b") else x, params)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 64, (ROWS, LENGTH + 1))


def outputs(params, model=MODEL, **execution):
    arch, buffers = build_architecture(model, ExecutionConfig(**execution), SCHEMES, LENGTH)
    batch = jax.tree.map(jnp.asarray, Batch.from_tokens(tokens()))
    with jax.default_matmul_precision("highest"):
        return logits(params, hidden_states(params, buffers, arch, batch)[0], model)


def random_module(ins, outs, rank, dora, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    module = {"kernel": rng.normal(size=(*ins, *outs)), "lora": {"scale": np.float64(0.7)}}
    module["lora"] |= {"a": rng.normal(size=(*ins, rank)), "b": rng.normal(size=(rank, *outs))}
    if dora:
        module["lora"]["magnitude"] = rng.random(outs) + 0.5
    if bias:
        module["bias"] = rng.normal(size=outs)
    return module


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("ins", "outs"), [((6,), (3, 2)), ((2, 3), (5,))])
def test_a_linear_map_follows_the_formula(ins, outs, dora):
    """y = x W' + bias with W' = m / ‖W + s·A·B‖ · (W + s·A·B), the norm over each output's inputs; m is there with DoRA only."""
    module = random_module(ins, outs, 2, dora)
    x = np.random.default_rng(1).normal(size=(4, 5, *ins))
    size = int(np.prod(ins))
    change = 0.7 * module["lora"]["a"].reshape(size, 2) @ module["lora"]["b"].reshape(2, -1)
    kernel = module["kernel"].reshape(size, -1) + change
    if dora:
        kernel = kernel * module["lora"]["magnitude"].reshape(-1) / np.sqrt((kernel**2).sum(axis=0))
    want = (x.reshape(4, 5, size) @ kernel).reshape(4, 5, *outs) + module["bias"]
    with jax.default_matmul_precision("highest"):
        got = linear(jax.tree.map(jnp.float32, module), jnp.float32(x), inputs=len(ins))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_norms_of_dora_carry_no_gradient():
    """In float64: the derivative of m / c · (x·(W + s·A·B)) with c held fixed, by A, B and m."""
    module = random_module((6,), (5,), 2, dora=True, bias=False)
    x, w = np.random.default_rng(1).normal(size=(4, 6)), np.random.default_rng(2).normal(size=(4, 5))
    a, b, m = (module["lora"][name] for name in ("a", "b", "magnitude"))
    kernel = module["kernel"] + 0.7 * a @ b
    ratio = m / np.sqrt((kernel**2).sum(axis=0))
    d_kernel = x.T @ (w * ratio)
    want = {"a": 0.7 * d_kernel @ b.T, "b": 0.7 * a.T @ d_kernel, "magnitude": (w * (x @ kernel)).sum(axis=0) * ratio / m}

    def loss(trained):
        own = jax.tree.map(jnp.float32, {**module, "lora": {**module["lora"], **trained}})
        return jnp.sum(linear(own, jnp.float32(x)) * w)

    with jax.default_matmul_precision("highest"):
        got = jax.grad(loss)({name: jnp.float32(module["lora"][name]) for name in want})
    assert worst_error(got, want)[0] <= 1e-5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(rank=4, alpha=6.0), 1.5),
        (LoraConfig(rank=4, alpha=6.0, rank_stabilized=True), 3.0),
        (LoraConfig(rank=4, alpha=6.0, ranks=(("query", 2),)), 3.0),
        (LoraConfig(rank=4, alpha=6.0, alphas=(("key", 1.0), ("query", 2.0), ("query", 9.0))), 0.5),
    ],
)
def test_scales_of_ranks_and_alphas(config, expected):
    table = lora.specs(specs(MODEL, SCHEMES, LENGTH), config)
    params = initialize(table, jax.random.key(0))["layers"]["attention"]["query"]["lora"]
    np.testing.assert_array_equal(params["scale"], np.full(3, expected, np.float32))
    assert params["a"].shape[-1] == config.rank_of("layers/attention/query/kernel")


@pytest.mark.parametrize(("init", "deviation"), [("kaiming", 24**-0.5 / 3**0.5), ("gaussian", 1 / 8)])
def test_adapters_start_without_effect(init, deviation):
    config = LoraConfig(rank=8, init=init, dora=True, targets=("kernel",))
    table = lora.specs(specs(MODEL, SCHEMES, LENGTH), config)
    params = lora.start(initialize(table, jax.random.key(0)))
    a = params["layers"]["mlp"]["up"]["lora"]["a"]
    np.testing.assert_allclose(np.std(a), deviation, rtol=0.1)
    assert init == "gaussian" or np.max(np.abs(a)) <= 24**-0.5
    base, _ = split(params, lambda path: not lora.is_adapter(path))
    assert worst_error(outputs(params), outputs(base))[0] <= 1e-6


def test_an_accelerator_rounds_no_product_of_folding():
    with jax.default_matmul_precision("default"):
        steps = jax.make_jaxpr(lora.fold)(tree(ALL)).eqns
    products = [step.params["precision"] for step in steps if step.primitive.name == "dot_general"]
    assert set(products) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("model", [MODEL, pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"])
@pytest.mark.parametrize("dora", mostly_slow([False, True], [True]))
def test_folded_equals_unfolded(model, dora):
    """Every kernel and the embeddings adapted, each with its own scale."""
    params = tree(dataclasses.replace(ALL, dora=dora, targets=("kernel",) if dora else ALL.targets), model)
    params = smaller(params)
    if dora:
        params = lora.start(params)
    folded = lora.fold(params)
    assert {path for path, _ in paths(folded)} == {path for path, _ in paths(params) if not lora.is_adapter(path)}
    assert worst_error(outputs(folded, model), outputs(params, model))[0] <= 1e-6
    base, _ = split(params, lambda path: not lora.is_adapter(path))
    assert worst_error(outputs(base, model), outputs(params, model))[0] > 0.01


def make_step(config, mesh, accumulate=1, model=MODEL, lr_scale=(), shifted_group=None, **optim):
    arch, buffers = build_architecture(model, ExecutionConfig(), SCHEMES, LENGTH, shifted_group)
    table = specs(model, SCHEMES, LENGTH) if config is None else lora.specs(specs(model, SCHEMES, LENGTH), config)
    chosen = OptimConfig(**{"lr": 1e-2, "schedule": "constant", "clip_norm": None, "lr_scale": lr_scale, **optim})
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * mesh.context]
    return train_step(arch, table, chosen, 5, make_mesh(mesh, devices), accumulate, config), buffers


def run(step, buffers, params, steps=5):
    """Losses and gradients of a few steps, and the state after them."""
    state, losses, gradients = step.state_from_params(jax.tree.map(jnp.array, params)), [], []
    for i in range(steps):
        batch = step.to_device(jax.tree.map(np.asarray, Batch.from_tokens(tokens(i))), ROWS)
        state, metrics, grads = step.with_gradients(state, batch, buffers)
        losses.append(metrics["loss"].item())
        gradients.append(jax.device_get(grads))
    return losses, gradients, jax.device_get(state)


ONE = MeshConfig(fsdp=1)


def test_full_rank_reproduces_the_full_step():
    """With A the identity and B zero, B has the gradient of the kernel, and one step of Adam changes A·B as it would the kernel."""
    name = "layers/attention/query/kernel"
    config = LoraConfig(rank=16, alpha=16.0, targets=(name,))
    params = initialize(lora.specs(specs(MODEL, SCHEMES, LENGTH), config), jax.random.key(0))
    adapter = params["layers"]["attention"]["query"]["lora"]
    # The kernel is 24 x 16, so that full rank is 16: identity on the outputs' side, and A is what learns.
    adapter["a"], adapter["b"] = jnp.zeros((3, 24, 16)), jnp.broadcast_to(jnp.eye(16).reshape(16, 4, 4), (3, 16, 4, 4))
    base, _ = split(params, lambda path: not lora.is_adapter(path))
    freeze = (r"^(?!layers/attention/query/kernel)",)
    optim = dict(weight_decay=0.0)
    _, wanted, full = run(*make_step(None, ONE, freeze=freeze, **optim), base, steps=1)
    _, gradients, adapted = run(*make_step(config, ONE, **optim), params, steps=1)
    want = wanted[0]["layers"]["attention"]["query"]["kernel"]
    got = gradients[0]["layers"]["attention"]["query"]["lora"]
    np.testing.assert_allclose(got["a"].reshape(want.shape), want, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(got["b"], 0.0)
    folded = lora.fold(adapted.all_params)
    assert worst_error(folded, full.all_params)[0] <= 1e-6


@pytest.mark.parametrize("dora", mostly_slow([False, True], [True]))
def test_only_adapters_and_what_is_named_are_trained(dora):
    config = LoraConfig(rank=2, dora=dora, train=("embed", "norm"), b_lr_ratio=1.0)
    params = tree(config)
    _, _, state = run(*make_step(config, ONE), params, steps=2)
    before = dict(paths(params))
    for path, leaf in paths(state.all_params):
        trains = path.endswith(("/a", "/b", "/magnitude")) or "embed" in path or "norm" in path
        assert np.array_equal(before[path], leaf) != trains, path
    held = {path.partition("/mu/")[2] for path, _ in paths(state.opt_state) if "/mu/" in path}
    assert held == {path for path, _ in paths(state.params)} and "layers/mlp/up/kernel" not in held


@pytest.mark.slow
def test_the_second_matrix_learns_faster():
    """LoRA+: the first step of Adam changes every number by the learning rate, and b by `b_lr_ratio` times it."""
    config = LoraConfig(rank=2, b_lr_ratio=16.0)
    params = tree(config)
    _, _, state = run(*make_step(config, ONE, lr_scale=config.lr_scale, weight_decay=0.0), params, steps=1)
    before = dict(paths(params))
    steps = {path: np.abs(np.asarray(leaf) - before[path]) for path, leaf in paths(state.params)}
    for path, step in steps.items():
        np.testing.assert_allclose(np.median(step), 0.16 if path.endswith("/b") else 0.01, rtol=1e-2)


MESHES = [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)]


@pytest.fixture(scope="module")
def one_device():
    config = dataclasses.replace(ALL, targets=("layers/attention", "layers/mlp", "head"), dora=True, train=("embed", "norm"))
    params = tree(config)
    return config, params, run(*make_step(config, ONE), params)


@pytest.mark.parametrize("sizes", mostly_slow(MESHES, [(2, 2, 2, 1)]))
def test_meshes_equal_one_device(one_device, sizes):
    config, params, (losses, gradients, state) = one_device
    data, fsdp, tensor, context = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)
    got_losses, got_gradients, got_state = run(*make_step(config, mesh), params)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-6)
    for got, want in zip(got_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-5
    assert worst_error(got_state.frozen, state.frozen)[0] == 0


@pytest.mark.slow
def test_accumulation_equals_one_batch(one_device):
    config, params, (losses, gradients, _) = one_device
    got_losses, got_gradients, _ = run(*make_step(config, ONE, accumulate=4), params)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-6)
    for got, want in zip(got_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-5


@pytest.mark.slow
def test_a_base_in_bfloat16():
    """Numbers that bfloat16 holds give the same losses and gradients, and frozen matrices take half the bytes."""
    params = tree(LoraConfig(rank=2, train=("mlp/up",)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.bfloat16).astype(jnp.float32) if path[-1].key in ("kernel", "embedding") else x, params
    )
    (losses, gradients, _), (narrow_losses, narrow_gradients, state) = (
        run(*make_step(LoraConfig(rank=2, train=("mlp/up",), base_dtype=dtype), ONE), params, steps=2)
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(narrow_losses, losses, rtol=1e-6)
    for got, want in zip(narrow_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-6
    dtypes = {path: leaf.dtype for path, leaf in paths(state.all_params)}
    assert {path for path, dtype in dtypes.items() if dtype == jnp.bfloat16} == {
        path for path in dtypes if path.endswith(("kernel", "embedding")) and "mlp/up" not in path
    }


def rounded(params, config, model=MODEL):
    """Parameters with the numbers that a quantised base holds, in float32."""
    table = dict(paths(lora.specs(specs(model, SCHEMES, LENGTH), config)))
    held = [dense(lora.held(path, x, table[path], config), jnp.float32) for path, x in paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), held)


@pytest.fixture(scope="module")
def quantised():
    """By kind: the config, parameters, and what training gives that is told the numbers which the base holds."""

    @functools.cache
    def of(kind):
        config = LoraConfig(rank=2, train=("mlp/up",), base_dtype=kind)
        params = smaller(tree(config))
        return config, params, run(*make_step(LoraConfig(rank=2, train=("mlp/up",)), ONE), rounded(params, config), steps=2)

    return of


@pytest.mark.parametrize("kind", mostly_slow(["int8", "nf4"], ["nf4"]))
def test_a_quantised_base(quantised, kind):
    """The same losses and gradients as with the numbers that it holds, which take 8 or 4 bits and their share of a scale."""
    config, params, (losses, gradients, _) = quantised(kind)
    got_losses, got_gradients, state = run(*make_step(config, ONE), params, steps=2)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-6)
    for got, want in zip(got_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-6
    held = dict(paths(state.all_params))
    kernels = {path for path in held if path.startswith("layers/") and path.endswith("/kernel") and "mlp/up" not in path}
    assert {path for path, leaf in held.items() if is_quantized(leaf)} == kernels
    assert held["head/kernel"].dtype == held["embed/embedding"].dtype == jnp.bfloat16
    table = dict(paths(lora.specs(specs(MODEL, SCHEMES, LENGTH), config)))
    inputs = {"query": 24, "key": 24, "value": 24, "out": 4, "gate": 24, "down": 32}
    for path in kernels:
        count, block = math.prod(table[path].shape), inputs[path.split("/")[-2]]
        bits = {"int8": 8, "nf4": 4}[kind] + 32 / block
        assert num_bytes(held[path]) == count * bits / 8 == count * lora.held_bytes(path, table[path], config), path


@pytest.mark.slow
def test_quantised_experts():
    config = LoraConfig(rank=2, base_dtype="nf4")
    params = smaller(tree(config, EXPERTS))
    (losses, gradients, _), (got_losses, got_gradients, state) = (
        run(*make_step(chosen, ONE, model=EXPERTS), given, steps=2)
        for chosen, given in ((LoraConfig(rank=2), rounded(params, config, EXPERTS)), (config, params))
    )
    np.testing.assert_allclose(got_losses, losses, rtol=1e-6)
    for got, want in zip(got_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-6
    mlp = state.frozen["layers"]["mlp"]
    assert is_quantized(mlp["up"]["kernel"]) and mlp["router"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_quantised_base_on_meshes(quantised, kind, sizes):
    config, params, (losses, gradients, _) = quantised(kind)
    data, fsdp, tensor, context = sizes
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)
    got_losses, got_gradients, _ = run(*make_step(config, mesh), params, steps=2)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-6)
    for got, want in zip(got_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-5


def test_frozen_kernels_cost_no_gradient():
    """The step of an adapter of rank 1 has about two thirds of the products with weights."""
    from lcx.model import flops

    def cost(config, params):
        step, buffers = make_step(config, ONE)
        batch = step.to_device(jax.tree.map(np.asarray, Batch.from_tokens(tokens())), ROWS)
        with jax.set_mesh(step.mesh):
            return flops.count(step._train, step.state_from_params(params), batch, buffers)

    config = LoraConfig(rank=1, targets=("mlp/up",))
    whole = cost(None, initialize(specs(MODEL, SCHEMES, LENGTH), jax.random.key(0)))
    adapter = cost(config, tree(config))
    weights = 2 * ROWS * LENGTH * (3 * 24 * (4 * 4 * 2 + 2 * 4 * 2 + 32 * 3) + 24 * 64)
    # In place of the kernels' gradients: an adapter's two products, with two gradients each, the first one recomputed.
    again = 2 * ROWS * LENGTH * 3 * 24
    assert whole - adapter == weights - 2 * ROWS * LENGTH * 3 * (3 * (24 + 32)) - again
    # What MFU goes by is the same but for what is recomputed.
    table = lora.specs(specs(MODEL, SCHEMES, LENGTH), config)
    frozen = flops.kernel_entries(MODEL, table, lambda path: not lora.is_adapter(path))
    added = flops.kernel_entries(MODEL, table, lora.is_adapter)
    counted = flops.step_flops(MODEL, ROWS, LENGTH) - flops.step_flops(MODEL, ROWS, LENGTH, frozen, added)
    assert counted == whole - adapter + again


@pytest.mark.slow
def test_shifted_groups_on_a_ring():
    config = LoraConfig(rank=2, train=("embed", "norm"))
    params = smaller(tree(config))
    losses, gradients, _ = run(*make_step(config, ONE, shifted_group=12), params, steps=2)
    got_losses, got_gradients, _ = run(*make_step(config, MeshConfig(fsdp=1, context=4), shifted_group=12), params, steps=2)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-6)
    for got, want in zip(got_gradients, gradients, strict=True):
        assert worst_error(got, want)[0] <= 1e-5
    _, whole_rows, _ = run(*make_step(config, ONE), params, steps=1)
    assert worst_error(whole_rows[0], gradients[0])[0] > 1e-4


def test_two_parts_of_a_tree():
    params = tree(LoraConfig(rank=2))
    parts = split(params, lambda path: "query" in path)
    assert {path.split("/")[2] for path, _ in paths(parts[0])} == {"query", "query_norm"}
    jax.tree.map(np.testing.assert_array_equal, join(*parts), params)
    assert split(params, lambda _: False)[0] == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 9}, "lora.rank=9 is above the smaller dimension of layers/attention/key/kernel, 8; lower it"),
        ({"rank": 0}, "lora.rank=0 must be above 0"),
        ({"alpha": -1.0}, "lora.alpha=-1.0 must be above 0"),
        ({"ranks": (("query", 0),)}, "lora.ranks.query=0 must be above 0"),
        ({"targets": ("quary",)}, "lora.targets: 'quary' matches no kernel; allowed: embed/embedding, head/kernel"),
        ({"targets": ()}, "lora.targets=.* leaves nothing to adapt"),
        ({"targets": ("router",)}, "lora.targets: 'router' matches no kernel"),
        ({"targets": ("(",)}, r"lora.targets: '\(' is not a regular expression"),
        ({"train": ("nrm",)}, "lora.train: 'nrm' matches no parameter"),
        ({"train": ("query",)}, "lora.train and lora.targets both match layers/attention/query/kernel"),
        ({"alphas": (("mlp", 2.0),)}, "lora.alphas: 'mlp' matches no target"),
        ({"dora": True, "targets": ("embed",)}, "lora.dora applies to matrices; take embed out"),
        ({"b_lr_ratio": 0.0}, "lora.b_lr_ratio=0.0 must be above 0"),
    ],
    ids=str,
)
def test_impossible_adapters(values, said):
    with pytest.raises(UserError, match=said):
        lora.specs(specs(EXPERTS, SCHEMES, LENGTH), LoraConfig(**{"rank": 2, **values}))


def test_a_tied_table_has_no_adapter():
    model = dataclasses.replace(MODEL, tied_embeddings=True)
    with pytest.raises(UserError, match="output layer, where an adapter would not be applied; train the table itself"):
        lora.specs(specs(model, SCHEMES, LENGTH), LoraConfig(rank=2, targets=("embed",)), model.tied_embeddings)
