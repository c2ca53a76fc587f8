import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.rotary import Linear, Ntk, Rope, rotate, tables
from lcx.positions.scaling import Dynamic, Llama3, LongRope, NtkByParts, Proportional, Yarn
from lcx.positions.scheme import Heads
from lcx.positions.xpos import Xpos

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=64)
ONES = (1.0,) * 8
# Each with the changed real-valued settings under which nothing may be compiled again.
SCHEMES = [
    (Rope(), {"theta": 5e5}),
    (Rope(partial=0.5), {"theta": 5e5}),
    (Linear(factor=4.0), {"factor": 8.0, "theta": 5e5}),
    (Ntk(factor=4.0), {"factor": 8.0, "theta": 5e5}),
    (Dynamic(factor=4.0, original_length=32), {"factor": 8.0, "theta": 5e5}),
    (NtkByParts(factor=4.0, original_length=32), {"factor": 8.0, "beta_fast": 4.0}),
    (Yarn(factor=4.0, original_length=32), {"factor": 8.0, "beta_fast": 4.0, "attention_factor": 2.0}),
    (Yarn(factor=4.0, original_length=32, variant="paper"), {"factor": 8.0, "theta": 5e5}),
    (Yarn(factor=4.0, original_length=32, mscale_all_dim=1.0, scale_softmax=True), {"factor": 8.0, "mscale": 0.5}),
    (Llama3(), {"factor": 32.0, "theta": 1e6}),
    (LongRope(short_factor=ONES, long_factor=(2.0,) * 8, original_length=32), {"long_factor": (3.0,) * 8, "factor": 5.0}),
    (Proportional(partial=0.5), {"factor": 2.0, "theta": 5e5}),
    (Xpos(), {"theta": 5e5, "scale_base": 1024.0, "gamma": 0.5}),
    (Rope(temperature=QueryScaling("llama4")), {"temperature": QueryScaling("llama4", 0.2, 16)}),
]
FACTOR_ONE = [
    Linear(factor=1.0),
    Linear(original_length=64),
    Ntk(factor=1.0),
    Dynamic(factor=1.0, original_length=64),
    Dynamic(factor=8.0, original_length=64),
    NtkByParts(factor=1.0, original_length=64),
    Yarn(factor=1.0, original_length=64),
    Yarn(original_length=64),
    Yarn(factor=1.0, original_length=64, variant="paper"),
    Yarn(factor=1.0, original_length=64, mscale=1.0, mscale_all_dim=0.5, scale_softmax=True),
    Llama3(factor=1.0, theta=10000.0),
    LongRope(short_factor=ONES, long_factor=ONES, factor=1.0, original_length=16),
    Proportional(),
]


def scores(scheme, q, k, positions, length=64):
    """Products of rotated queries and keys, [B, N, T, S], in float32."""
    spec = scheme.spec(length)
    buffers = scheme.buffers(HEADS, length)
    (region,) = spec.regions
    made = tables(spec, buffers, positions)
    q = rotate(q, *made[region.q_rotation], spec.layout)
    k = rotate(k, *made[region.k_rotation], spec.layout)
    return jnp.einsum("btnh,bsnh->bnts", q, k)


@pytest.fixture(scope="module")
def qk():
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(key, (1, 12, 2, 16)) for key in keys)


def test_rotation_by_hand():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[None, None, None, :]
    cos, sin = jnp.cos(jnp.asarray([0.3, 0.7]))[None, None, :], jnp.sin(jnp.asarray([0.3, 0.7]))[None, None, :]
    c, s = np.cos([0.3, 0.7]), np.sin([0.3, 0.7])
    half = [c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + s[0], 4 * c[1] + 2 * s[1], 5, 6]
    pairs = [c[0] - 2 * s[0], 2 * c[0] + s[0], 3 * c[1] - 4 * s[1], 4 * c[1] + 3 * s[1], 5, 6]
    np.testing.assert_allclose(np.asarray(rotate(x, cos, sin))[0, 0, 0], half, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(rotate(x, cos, sin, "interleaved"))[0, 0, 0], pairs, rtol=1e-6)
    assert rotate(x.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_layouts_are_equal_under_permutation(qk):
    order = np.arange(16).reshape(2, 8).T.reshape(-1)
    positions = jnp.arange(12, dtype=jnp.int32)[None] * 977
    half = scores(Rope(), *qk, positions)
    interleaved = scores(Rope(layout="interleaved"), qk[0][..., order], qk[1][..., order], positions)
    np.testing.assert_allclose(half, interleaved, atol=1e-5)


@pytest.mark.parametrize("scheme", [scheme for scheme, _ in SCHEMES], ids=lambda scheme: repr(scheme)[:60])
def test_scores_depend_on_relative_positions_alone(scheme, qk):
    positions = jnp.asarray([[0, 1, 2, 3, 5, 8, 13, 21, 34, 40, 50, 60]], jnp.int32)
    near, far = scores(scheme, *qk, positions), scores(scheme, *qk, positions + (3 if scheme.name == "xpos" else 2**31 - 64))
    assert np.max(np.abs(near - far)) <= 5e-6 * max(1, np.max(np.abs(near)))


def test_partial_rotary_leaves_the_rest_alone(qk):
    scheme = Rope(partial=0.25)
    made = tables(scheme.spec(64), scheme.buffers(HEADS, 64), jnp.arange(12, dtype=jnp.int32)[None])
    turned = rotate(qk[0], *made["rotary"])
    np.testing.assert_array_equal(turned[..., 4:], qk[0][..., 4:])
    assert np.all(np.any(np.asarray(turned[:, 1:, :, :4] != qk[0][:, 1:, :, :4]), axis=-1))


def test_proportional_turns_the_fast_pairs_only():
    frequencies = Proportional(partial=0.5).inverse_frequencies(16, 64)
    np.testing.assert_allclose(frequencies[:4], Rope().inverse_frequencies(16, 64)[:4])
    assert np.all(frequencies[4:] == 0)


@pytest.mark.parametrize("scheme", FACTOR_ONE, ids=lambda scheme: repr(scheme)[:60])
def test_factor_one_is_the_identity(scheme):
    rotation, plain = (s.buffers(HEADS, 64)["rotations"]["rotary"] for s in (scheme, Rope()))
    assert scheme.spec(64) == Rope().spec(64)
    assert np.array_equal(rotation.hi, plain.hi) and np.array_equal(rotation.lo, plain.lo) and rotation.amplitude == 1


@pytest.mark.parametrize(("scheme", "changes"), SCHEMES, ids=lambda value: repr(value)[:40])
def test_real_valued_settings_change_arrays_and_nothing_else(scheme, changes):
    changed = dataclasses.replace(scheme, **changes)
    assert changed.spec(64) == scheme.spec(64) and hash(changed.spec(64)) == hash(scheme.spec(64))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s.buffers(HEADS, 64)) for s in (scheme, changed)]
    assert shapes[0] == shapes[1]
    leaves = [jax.tree.leaves(s.buffers(HEADS, 64)) for s in (scheme, changed)]
    assert any(not np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def test_rotary_schemes_share_one_compiled_program():
    traces = []

    def run(spec, buffers, positions):
        traces.append(spec)
        return tables(spec, buffers, positions)

    compiled = jax.jit(run, static_argnums=0)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    for scheme in (Rope(), Rope(theta=500.0), Linear(factor=2.0), Ntk(factor=3.0), Yarn(factor=4.0, original_length=16), Llama3()):
        for length in (64, 128):
            compiled(scheme.spec(length), scheme.buffers(HEADS, length), positions)
    assert len(traces) == 1


def test_missing_factor_comes_from_the_declared_length():
    open_, fixed = Yarn(original_length=32), Yarn(original_length=32, factor=4.0)
    np.testing.assert_array_equal(open_.inverse_frequencies(16, 128), fixed.inverse_frequencies(16, 64))
    assert open_.amplitude(128) == fixed.amplitude(64)


def test_longrope_switches_beyond_the_trained_length():
    scheme = LongRope(short_factor=(1.5,) * 8, long_factor=(3.0,) * 8, original_length=32)
    np.testing.assert_allclose(scheme.inverse_frequencies(16, 32) / scheme.inverse_frequencies(16, 33), 2.0)


def test_xpos_decays_as_published_and_refuses_to_overflow(qk):
    scheme = Xpos(scale_base=8.0)
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    zeta = (np.arange(8) / 8 + 0.4) / 1.4
    gap = np.arange(12)[:, None, None] - np.arange(12)[None, :, None]
    q, k = (np.asarray(x, np.float64)[0, :, 0] for x in qk)
    complex_q, complex_k = q[:, :8] + 1j * q[:, 8:], k[:, :8] + 1j * k[:, 8:]
    turned = (
        complex_q[:, None] * np.conj(complex_k)[None] * np.exp(1j * gap * Rope().inverse_frequencies(16, 1)) * zeta ** (gap / 8)
    )
    np.testing.assert_allclose(scores(scheme, *qk, positions)[0, 0], turned.real.sum(-1), atol=2e-5)
    with pytest.raises(UserError, match="raise it to"):
        Xpos().spec(65536)
    scheme = Xpos(scale_base=16500.0)
    made = tables(scheme.spec(2**20), scheme.buffers(HEADS, 2**20), jnp.asarray([[0, 2**20 - 1]], jnp.int32))
    assert all(np.all(np.isfinite(x)) for pair in made.values() for x in pair)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rope(theta=-1.0), "theta=-1.0"),
        (lambda: Rope(theta=float("nan")), "theta=nan"),
        (lambda: Rope(layout="halves"), "did you mean 'half'"),
        (lambda: Rope(partial=1.5), "partial=1.5"),
        (lambda: Rope(partial=0.2).spec(64) and Rope(partial=0.2).buffers(HEADS, 64), "= 3 dims"),
        (lambda: Rope().buffers(dataclasses.replace(HEADS, head_dim=15), 64), "= 15 dims"),
        (lambda: Linear(factor=0.5), "factor=0.5"),
        (lambda: Linear().spec(64), "needs linear.factor"),
        (lambda: Yarn(factor=2.0).spec(64), "needs yarn.original_length"),
        (lambda: Yarn(beta_fast=1.0, beta_slow=2.0), "beta_fast=1.0"),
        (lambda: Yarn(variant="papers"), "did you mean 'paper'"),
        (lambda: Yarn(scale_softmax=True), "mscale_all_dim"),
        (lambda: Dynamic(factor=2.0).spec(64), "needs dynamic.original_length"),
        (lambda: Llama3(low_freq_factor=4.0), "high_freq_factor=4.0"),
        (lambda: LongRope(short_factor=ONES, long_factor=ONES[1:], original_length=8).buffers(HEADS, 64), "7 values for 8"),
        (lambda: LongRope(short_factor=ONES, long_factor=(0.0,) * 8), "contains 0.0"),
        (lambda: Ntk(factor=2.0, partial=0.125).buffers(HEADS, 64), "rotary dim above 2"),
        (lambda: Proportional(partial=0.1).buffers(HEADS, 64), "no rotating pair"),
        (lambda: Xpos(gamma=0.0), "gamma=0.0"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
