import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.positions.bias import T5, Alibi, Fire, Kerple, T5Bias, alibi_slopes
from lcx.positions.scheme import Heads

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=64)
Q = jnp.asarray([[0, 5, 130, 40, 2**31 - 1], [3, 3, 9, 700, 1]], jnp.int32)
K = jnp.asarray([[0, 4, 0, 2**31 - 9], [1, 2, 3, 4]], jnp.int32)
DISTANCE = np.asarray(Q, np.int64)[:, :, None] - np.asarray(K, np.int64)[:, None, :]


def inputs(scheme):
    params = initialize(scheme.param_specs(HEADS, 64), jax.random.key(0))
    return {**scheme.buffers(HEADS, 64).get("bias", {}), **params}


def tile(scheme):
    return scheme.spec(64).bias(inputs(scheme), Q, K)


def test_published_alibi_slopes():
    wanted = [2.0**-k for k in range(1, 9)] + [0.70710678, 0.35355339, 0.1767767, 0.08838835]
    np.testing.assert_allclose(alibi_slopes(12), wanted, rtol=1e-7)
    np.testing.assert_allclose(alibi_slopes(16), [2 ** (-0.5 * k) for k in range(1, 17)])


def test_alibi_tile():
    wanted = -np.asarray(alibi_slopes(4))[None, :, None, None] * np.abs(DISTANCE)[:, None]
    np.testing.assert_allclose(tile(Alibi()), wanted, rtol=2e-7)
    np.testing.assert_allclose(tile(Alibi(scale=0.5)), wanted / 2, rtol=2e-7)


def reference_bucket(distance, buckets=32, max_distance=128, bidirectional=False):
    """T5's rule in exact arithmetic on the logarithm."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, distance = (buckets if distance < 0 else 0), abs(distance)
    distance, exact = max(distance, 0), buckets // 2
    if distance < exact:
        return first + distance
    far = math.floor(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-9)
    return first + min(exact + far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets(bidirectional):
    distances = np.concatenate([np.arange(-300, 300), [2**31 - 1]])
    spec = T5Bias(32, 128, bidirectional)
    found = spec.bucket(jnp.asarray(distances, jnp.int32)[None, None])[0, 0]
    assert found.tolist() == [reference_bucket(int(d), bidirectional=bidirectional) for d in distances]
    if not bidirectional:
        assert [found[300 + d] for d in (0, 15, 16, 127, 128)] == [0, 15, 16, 31, 31]


def test_t5_tile_looks_up_its_table():
    table = np.asarray(inputs(T5())["table"])
    wanted = np.vectorize(lambda d: reference_bucket(int(d)))(DISTANCE)
    np.testing.assert_array_equal(tile(T5()), np.moveaxis(table[wanted], -1, 1))


def test_kerple_tile():
    wanted = -2.0 * np.log1p(0.5 * np.abs(DISTANCE))[:, None]
    np.testing.assert_allclose(tile(Kerple(r1=2.0, r2=0.5)), np.broadcast_to(wanted, (2, 4, 5, 4)), rtol=1e-6)


def test_fire_tile():
    scheme = Fire(c=0.1, threshold=100.0)
    p = {key: np.asarray(value, np.float64) for key, value in inputs(scheme).items()}
    reach = np.maximum(np.asarray(Q, np.float64), 100)[:, :, None]
    ratio = np.log1p(0.1 * np.abs(DISTANCE)) / np.log1p(0.1 * reach)
    wanted = np.maximum(ratio[..., None] * p["hidden"] + p["shift"], 0) @ p["out"] + p["offset"]
    np.testing.assert_allclose(tile(scheme), np.moveaxis(wanted, -1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [Alibi(), T5(), Kerple(), Fire()], ids=lambda scheme: scheme.name)
def test_tiles_and_gradients_are_finite(scheme):
    values = inputs(scheme)
    spec = scheme.spec(64)
    assert tile(scheme).dtype == jnp.float32 and tile(scheme).shape == (2, 4, 5, 4)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(spec.bias(p, Q, K))))(values)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


def test_a_changed_scale_keeps_the_form():
    assert Alibi().spec(64) == Alibi(scale=0.25).spec(64) and hash(Kerple().spec(1)) == hash(Kerple(r1=2.0).spec(9))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: T5(buckets=31), "buckets=31"),
        (lambda: T5(max_distance=16), "max_distance=16"),
        (lambda: Kerple(r1=0.0), "r1=0.0"),
        (lambda: Fire(width=0), "width=0"),
        (lambda: Alibi(scale=-1.0), "scale=-1.0"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
