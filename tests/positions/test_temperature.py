import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.positions.absolute import Nope
from lcx.positions.form import Heads
from lcx.positions.rotary import Rope
from lcx.positions.temperature import Temperature

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=64)
POSITIONS = jnp.asarray([[0, 1, 8190, 8191, 8192, 100_000, 2**31 - 1]], jnp.int32)
P = np.asarray(POSITIONS, np.float64)


def factors(temperature, **settings):
    scheme = Rope(temperature=temperature, **settings)
    value = scheme.form(64).temperature(scheme.arrays(HEADS, 64)["temperature"], POSITIONS)
    assert value.dtype == jnp.float32 and value.shape == POSITIONS.shape
    return value


def test_published_temperatures():
    np.testing.assert_allclose(factors(Temperature("llama4")), 1 + 0.1 * np.log1p((P + 1) // 8192), rtol=1e-6)
    np.testing.assert_allclose(factors(Temperature("ministral"), original_length=16384), 1 + 0.1 * np.log1p(P // 16384), rtol=1e-6)
    np.testing.assert_allclose(factors(Temperature("log_n", length=2048)), np.maximum(1, np.log(P + 1) / np.log(2048)), rtol=1e-6)
    np.testing.assert_allclose(factors(Temperature("ssmax", scale=0.5)), 0.5 * np.log(P + 1), rtol=1e-6)


def test_nope_layers_take_a_temperature():
    scheme = Nope(temperature=Temperature("llama4", length=4))
    assert scheme.form(64).pieces[0].q_phase is None
    assert scheme.form(64).temperature(scheme.arrays(HEADS, 64)["temperature"], POSITIONS)[0, 1] == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Temperature("llama5"), "did you mean 'llama4'"),
        (lambda: Temperature("llama4", scale=0.0), "scale=0.0"),
        (lambda: factors(Temperature("ministral")), "needs temperature.length"),
        (lambda: factors(Temperature("log_n", length=1)), "at least 2"),
        (lambda: Rope(temperature="llama4"), "must be a Temperature"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
