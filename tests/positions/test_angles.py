import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lcx.positions import angles
from lcx.positions.rotary import Rope, tables
from lcx.positions.scheme import Heads

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=128, model_dim=512)
FAR = (1_048_575, 16_777_215, 2_147_483_647)
THETAS = (1e4, 5e5, 1e8, 2.8e9, 4.5e10)


def exact(theta, positions):
    """Cosines and sines, float64 [T, R], worked out with 50 digits."""
    with mpmath.workdps(50):
        frequencies = [mpmath.power(theta, mpmath.mpf(-2 * i) / 128) for i in range(64)]
        cos = [[float(mpmath.cos(p * f)) for f in frequencies] for p in positions]
        sin = [[float(mpmath.sin(p * f)) for f in frequencies] for p in positions]
    return np.asarray(cos), np.asarray(sin)


@pytest.mark.parametrize("theta", THETAS)
def test_angles_are_exact_at_any_position(theta):
    scheme = Rope(theta=theta)
    positions = (0, 1, 8191, *FAR)
    buffers = scheme.buffers(HEADS, 2**31 - 1)
    cos, sin = tables(scheme.spec(2**31 - 1), buffers, jnp.asarray([positions], jnp.int32))["rotary"]
    wanted_cos, wanted_sin = exact(theta, positions)
    assert cos.dtype == sin.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(cos[0], np.float64) - wanted_cos)) <= 1e-7
    assert np.max(np.abs(np.asarray(sin[0], np.float64) - wanted_sin)) <= 1e-7


@pytest.mark.parametrize("theta", THETAS)
def test_float32_product_of_position_and_frequency_would_fail(theta):
    frequencies = np.asarray(Rope(theta=theta).inverse_frequencies(128, 1), np.float32)
    product = np.asarray(FAR, np.float32)[:, None] * frequencies[None, :]
    error = np.max(np.abs(np.cos(product).astype(np.float64) - exact(theta, FAR)[0]), axis=1)
    assert np.all(error > 1e-2), error


def test_cos_and_sin_of_every_part_of_the_turn():
    rng = np.random.default_rng(0)
    edges = np.asarray([(k << 29) + shift for k in range(8) for shift in (-1, 0, 1)]) % 2**32
    turns = np.concatenate([edges, rng.integers(0, 2**32, 200_000)]).astype(np.uint32)
    cos, sin = jax.jit(angles.cos_sin_of_turns)(jnp.asarray(turns))
    angle = turns.astype(np.float64) * (2 * np.pi / 2**32)
    assert np.max(np.abs(np.asarray(cos, np.float64) - np.cos(angle))) <= 1e-7
    assert np.max(np.abs(np.asarray(sin, np.float64) - np.sin(angle))) <= 1e-7


def test_wrapped_multiplication_against_whole_numbers():
    rng = np.random.default_rng(1)
    words = [int(x) for x in rng.integers(0, 2**63, 64)]
    hi = np.asarray([w >> 32 for w in words], np.uint32)
    lo = np.asarray([w & 0xFFFFFFFF for w in words], np.uint32)
    positions = np.asarray([0, 1, 2, 65535, 65536, 2**31 - 1, 123456789], np.int32)
    wanted = [[(int(p) * w % 2**64) >> 32 for w in words] for p in positions]
    assert np.array_equal(np.asarray(angles.turns(hi, lo, jnp.asarray(positions))), np.asarray(wanted, np.uint32))


def test_words_decode_to_the_frequencies():
    frequencies = Rope(theta=4.5e10).inverse_frequencies(128, 1)
    np.testing.assert_allclose(angles.decode(*angles.encode(frequencies)), frequencies, rtol=1e-7)
    hi, lo = angles.encode([0.0])
    assert hi[0] == lo[0] == 0


def test_grid_remaps_positions():
    positions = jnp.arange(20, dtype=jnp.uint32)
    out = np.asarray(angles.position_map(divide=2, modulo=4, offset=3, clip=5)(positions))
    assert np.array_equal(out, np.minimum(np.arange(20) // 2 % 4 + 3, 5))
    assert np.asarray(angles.position_map()(jnp.asarray([2**31 - 1], jnp.uint32)))[0] == 2**31 - 1
