"""The decoder: every family runs, sees no future, and computes the same whatever the scan, remat or dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import PADDING, SHARED, Batch, Index
from lcx.core.errors import UserError
from lcx.core.mask import Mask, visible, visible_pairs
from lcx.core.param_spec import ParamSpec, initialize
from lcx.model import flops
from lcx.model.architecture import Architecture, build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.linear import linear, turned
from lcx.model.loss import loss_sums
from lcx.model.params import specs
from lcx.model.presets import FAMILIES, shrink
from lcx.model.transformer import LayerInputs, hidden_states, scan_layers, shifted_attention
from lcx.positions.derive import with_theta
from tests.compare import worst_error
from tests.quick import mostly_slow

T = 32
TINY = ModelConfig(
    model_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, pattern=("local", "global"), window=8
)
POSITIONS = {"default": "rope:theta=500", "local": "rope:theta=100"}


def build(config: ModelConfig, positions: dict, length: int = T, seed: int = 0):
    schemes = build_schemes(config, positions)
    arch, buffers = build_architecture(config, ExecutionConfig(), schemes, length)
    return initialize(specs(config, schemes, length), jax.random.key(seed)), buffers, arch


def tokens(rows: int = 2, length: int = T) -> np.ndarray:
    """Every token of a row differs, so that a gradient with respect to an embedding row belongs to one place."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(256)[: length + 1] for _ in range(rows)])


def loss(params, buffers, arch, batch):
    return loss_sums(params, hidden_states(params, buffers, arch, batch)[0], batch, arch).nll


def test_temperatures_count_keys():
    """Not positions that skip, nor keys of the document before where positions begin anew."""
    temperature = "temperature.kind=ministral,temperature.length=8,temperature.scale=0.5"
    params, buffers, arch = build(TINY, {"default": f"rope:theta=500,{temperature}"})
    order = np.arange(16, dtype=np.int32)[None]
    expected = 1 + 0.5 * np.log1p(order // 8)
    skipped, anew = order + 1000 * (order >= 4), order % 8
    for positions, wanted in ((order, expected), (skipped, expected), (anew, np.ones_like(expected))):
        index = Index(jnp.asarray(order), jnp.asarray(positions), jnp.asarray(1 + (order - positions).clip(0)))
        found = LayerInputs.build(arch, "global", params, buffers, index).query_scale
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, ("llama3_8b", "gemma3_4b")))
def test_families_run_and_see_no_future(name):
    family = FAMILIES[name]
    config = dataclasses.replace(shrink(family.model), tied_embeddings=False)
    params, buffers, arch = build(config, family.positions)
    batch = Batch.from_tokens(tokens(1))
    place = 19

    def at_place(embedding):
        changed = {**params, "embed": {"embedding": embedding}}
        return jnp.sum(jnp.sin(hidden_states(changed, buffers, arch, batch)[0][0, place]))

    gradient = jax.jit(jax.grad(at_place))(params["embed"]["embedding"])
    reach = np.abs(np.asarray(gradient)[np.asarray(batch.tokens[0])]).sum(-1)
    assert np.all(reach[place + 1 :] == 0)
    assert reach[place] > 0 and reach[place - 1] > 0
    if config.window is None:
        assert np.all(reach[: place + 1] > 0)


def test_scan_over_periods_equals_single_layers():
    params, buffers, arch = build(dataclasses.replace(TINY, num_layers=5), POSITIONS)
    x = jax.random.normal(jax.random.key(1), (2, T, 32))

    seen = {"local": 10.0, "global": 20.0}

    def attend(kind, nth, layer, state, q, k, v):
        # Told apart by kind and by number, so that a wrong order or a wrong kind shows.
        met, i = state
        return q * (2.0 if kind == "local" else 0.5) + seen[kind] + nth + i, (met.at[i].set(seen[kind] + nth), i + 1)

    together, after, _ = scan_layers(params["layers"], x, arch, attend, (jnp.zeros(5), 0))
    np.testing.assert_array_equal(after[0], [10, 20, 11, 21, 12])
    apart = x
    for i, kind in enumerate(arch.config.layer_kinds):
        one = dataclasses.replace(arch, config=dataclasses.replace(arch.config, num_layers=1, pattern=(kind,)))
        weights = jax.tree.map(lambda w, i=i: w[i : i + 1], params["layers"])
        apart, *_ = scan_layers(
            weights, apart, one, lambda *args, i=i: attend(args[0], i // 2, args[2], (jnp.zeros(5), i), *args[4:])
        )
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "attention", "attention": "blockwise"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"remat": "block"}, marks=pytest.mark.slow),
        pytest.param({"remat": "offload", "attention": "blockwise"}, marks=pytest.mark.slow),
        pytest.param({"layer_unroll": 1}, marks=pytest.mark.slow),
        pytest.param({"mlp_tile": T // 4}, marks=pytest.mark.slow),
        pytest.param({"loss_tile": 64}, marks=pytest.mark.slow),
        pytest.param({"remat": "nested", "remat_every": 2, "attention": "blockwise"}, marks=pytest.mark.slow),
        pytest.param({"remat": "nested_offload", "remat_every": 2, "attention": "blockwise"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_saves_memory_changes_no_gradient(changes):
    params, buffers, arch = build(TINY, POSITIONS)
    batch = Batch.from_tokens(tokens())
    again = dataclasses.replace(arch, execution=ExecutionConfig(**changes))
    plain = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    want, got = plain(params, buffers, arch, batch), plain(params, buffers, again, batch)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert worst_error(got[1], want[1])[0] <= 1e-5


@pytest.mark.parametrize("outs", [(6,), (40,), (2, 12)], ids=str)
def test_linear_has_the_gradients_of_a_contraction(outs):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 10, 16)), jax.random.normal(keys[1], (16, *outs))
    y, pull = jax.vjp(lambda x, kernel: linear({"kernel": kernel}, x), x, kernel)
    want, want_pull = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, 1), x, kernel)
    dy = jax.random.normal(keys[2], y.shape)
    np.testing.assert_allclose(y, want, atol=1e-5)
    for got, wanted in zip(pull(dy), want_pull(dy), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("outs", [(6,), (40,), (2, 12)], ids=str)
def test_linear_rounds_bfloat16_once(outs):
    """Sums are float32, so that results are those of exact sums to the last place (2⁻⁸)."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 300, 600), (600, *outs), (2, 300, *outs))
    x, kernel, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    y, pull = jax.vjp(lambda x, kernel: linear({"kernel": kernel}, x), x, kernel)
    want, want_pull = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, 1), *(one.astype(jnp.float32) for one in (x, kernel)))
    for got, wanted in zip((y, *pull(dy)), (want, *want_pull(dy.astype(jnp.float32))), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("ins,outs", [((16,), (40,)), ((16,), (2, 12)), ((2, 8), (16,))], ids=str)
def test_turned_kernels_multiply_the_same(ins, outs, rows):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"one": {"kernel": jax.random.normal(keys[0], (*ins, *outs)), "bias": jax.random.normal(keys[1], outs)}}
    other = turned(
        params, {"one": {"kernel": ParamSpec((3, *ins, *outs), (None,) * (1 + len(ins + outs)), inputs=len(ins), stacked=1)}}
    )["one"]
    assert set(other) == {"turned", "bias"} and other["turned"].shape == (*outs, *ins)
    x = jax.random.normal(keys[2], (1, rows, *ins))
    want = linear(params["one"], x, len(ins))
    np.testing.assert_allclose(linear(other, x, len(ins)), want, rtol=1e-5, atol=1e-5)
    plain, other, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params["one"], other, x))
    got, want = linear(other, x, len(ins)), linear(plain, x, len(ins))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=2**-9)


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    params, buffers, arch = build(TINY, POSITIONS)
    batch = Batch.from_tokens(tokens())
    low = dataclasses.replace(arch, execution=ExecutionConfig(compute_dtype="bfloat16"))
    want, got = loss(params, buffers, arch, batch), loss(params, buffers, low, batch)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=5e-3)
    gradients = jax.grad(loss)(params, buffers, low, batch)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_changing_theta_compiles_nothing_again():
    schemes = build_schemes(TINY, POSITIONS)
    params, buffers, arch = build(TINY, POSITIONS)
    batch = Batch.from_tokens(tokens())
    traced = []

    def counted(params, buffers, arch: Architecture, batch):
        traced.append(arch)
        return loss(params, buffers, arch, batch)

    step = jax.jit(counted, static_argnums=2)
    values = []
    for theta in (500.0, 2000.0, 1e6):
        arch, buffers = build_architecture(TINY, ExecutionConfig(), {**schemes, "global": with_theta(schemes["global"], theta)}, T)
        values.append(float(step(params, buffers, arch, batch)))
    assert len(traced) == 1
    assert len(set(values)) == 3


def test_one_scheme_alone_is_added_to_the_embeddings():
    def build(**positions):
        return build_architecture(TINY, ExecutionConfig(), build_schemes(TINY, positions), T)

    for other in ("learned:max_length=1024", "sinusoidal:theta=500"):
        with pytest.raises(UserError, match="positions.local and positions.global would each add vectors of their own"):
            build(local="sinusoidal", **{"global": other})
    assert build(local="sinusoidal", **{"global": "sinusoidal:temperature.kind=log_n,temperature.length=16"})
    assert build(local="nope", **{"global": "learned:max_length=1024"})


def test_flops_agree_with_the_walked_program():
    config = dataclasses.replace(TINY, pattern=("global",), window=None)
    params, buffers, arch = build(config, {"default": "rope:theta=500"})
    arch = dataclasses.replace(arch, execution=ExecutionConfig(attention="dense"))
    batch = Batch.from_tokens(tokens())
    walked = flops.count(lambda p, b: loss(p, buffers, arch, b), params, batch)
    per_row = flops.forward_flops(config, 1, T)
    # Dense attention computes all T * T pairs of every head, the formula charges the T(T+1)/2 that are visible.
    hidden_pairs = 4 * config.num_layers * config.num_heads * config.head_dim * (T * T - visible_pairs(T, None))
    assert walked == 2 * (per_row + hidden_pairs)


def test_flops_of_a_scanned_loop_count_every_trip():
    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert flops.count(looped, jnp.ones((4, 4))) == 7 * 2 * 4**3


@pytest.mark.parametrize("manual", [{"data"}, {"data", "tensor"}])
def test_flops_of_a_split_program_are_those_of_the_whole(manual):
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.P(tuple(sorted(manual)))

    def product(x, y):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows, axis_names=manual)(x, y)

    assert flops.count(product, jnp.ones((8, 4)), jnp.ones((4, 4))) == 2 * 8 * 4 * 4


def test_visible_pairs():
    for length in (1, 5, 16):
        for window in (None, 1, 3, 16, 40):
            order = np.arange(length)
            distance = order[:, None] - order[None, :]
            want = (distance >= 0) & (distance < (window or length))
            assert visible_pairs(length, window) == want.sum()


def grouped_index(length: int) -> Index:
    """Two documents, a token that both see, and padding, in an order that is not that of the row."""
    order = np.random.default_rng(3).permutation(length)
    segments = np.where(order < length // 2, 1, 2)
    segments[order == 0], segments[order >= length - 3] = SHARED, PADDING
    return Index(*(jnp.asarray(x[None], jnp.int32) for x in (order, order, segments)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 3), (3, 1)])
def test_shifted_attention_is_that_of_groups_by_order(heads, kv_heads):
    """Each head against a softmax over the keys of its document, its group and its past, in float64."""
    group, length, rng = 8, 36, np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, length, n, 5)) for n in (heads, kv_heads, kv_heads))
    index, seen = grouped_index(length), []

    def run(q, k, v, index, _, sinks):
        seen.append(q.shape[2])
        mask = np.asarray(visible(Mask(), index, index))[0]
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = jnp.where(mask[None], jnp.einsum("bthd,bshd->bhts", q, k)[0], -jnp.inf)
        weights = jnp.where(mask.any(1)[None, :, None], jax.nn.softmax(scores, axis=-1), 0.0)
        return jnp.einsum("hts,bshd->bthd", weights, v)

    got = shifted_attention(run, group, *(jnp.float32(x) for x in (q, k, v)), index, None)[0]
    order, segments = (np.asarray(x)[0] for x in (index.order, index.segments))
    assert sum(seen) == heads and len(seen) == 2
    for h in range(heads):
        shift = 0 if h < seen[0] else group // 2
        own = (order + shift) // group
        kv = h * kv_heads // heads
        for t in np.flatnonzero(segments != PADDING):
            keys = (order <= order[t]) & (segments != PADDING)
            keys &= (segments == SHARED) | (segments == segments[t]) & (own == own[t]) & (segments[t] != SHARED)
            scores = k[0, keys, kv] @ q[0, t, h]
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(got[t, h], weights @ v[0, keys, kv] / weights.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_shifted_model_sees_no_future_and_no_other_group():
    """The token after a boundary of both halves' groups, and the wrapped group of the paper, whose head would see its tail."""
    config = dataclasses.replace(TINY, pattern=("global",), num_layers=1)
    params, buffers, arch = build(config, {"default": "rope:theta=500"})
    arch, batch = dataclasses.replace(arch, shifted_group=8), Batch.from_tokens(tokens(1))

    @jax.jit
    @jax.grad
    def gradient_at(embedding, place):
        changed = {**params, "embed": {"embedding": embedding}}
        return jnp.sum(jnp.sin(hidden_states(changed, buffers, arch, batch)[0][0, place]))

    def influence(place):
        gradient = jnp.abs(gradient_at(params["embed"]["embedding"], place)).sum(axis=1)[batch.tokens[0]]
        return set(np.flatnonzero(np.asarray(gradient) > 0).tolist())

    assert influence(2) == {0, 1, 2}
    assert influence(9) == set(range(4, 10))
    assert influence(13) == set(range(8, 14))
    whole = hidden_states(params, buffers, dataclasses.replace(arch, shifted_group=2 * T), batch)[0]
    exact = hidden_states(params, buffers, dataclasses.replace(arch, shifted_group=None), batch)[0]
    assert worst_error(whole, exact)[0] <= 1e-6


@pytest.mark.parametrize("remat", mostly_slow(["block", "nested"], ["block"]))
def test_stacks_of_weights_are_not_copied(remat):
    """Of a model with one kind of layer, forward and backward with respect to its input; the weights are much of the memory."""
    config = dataclasses.replace(TINY, pattern=("global",), window=None, num_layers=30, mlp_dim=2048)
    params, buffers, arch = build(config, {"default": "rope:theta=500"})
    arch = dataclasses.replace(arch, execution=ExecutionConfig(remat=remat))
    batch = Batch.from_tokens(tokens())

    def run(params, table):
        return jax.grad(lambda table: loss({**params, "embed": {"embedding": table}}, buffers, arch, batch))(table)

    memory = jax.jit(run).lower(params, params["embed"]["embedding"]).compile().memory_analysis()
    stack = params["layers"]["mlp"]["up"]["kernel"].nbytes
    assert memory.temp_size_in_bytes < stack
