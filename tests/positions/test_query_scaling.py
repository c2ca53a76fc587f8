import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.positions.absolute import Nope
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.rotary import Rope
from lcx.positions.scheme import Heads

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=64)
POSITIONS = jnp.asarray([[0, 1, 8190, 8191, 8192, 100_000, 2**31 - 1]], jnp.int32)
P = np.asarray(POSITIONS, np.float64)


def factors(temperature, **settings):
    scheme = Rope(temperature=temperature, **settings)
    value = scheme.spec(64).query_scale(scheme.buffers(HEADS, 64)["query_scale"], POSITIONS)
    assert value.dtype == jnp.float32 and value.shape == POSITIONS.shape
    return value


def test_published_temperatures():
    np.testing.assert_allclose(factors(QueryScaling("llama4")), 1 + 0.1 * np.log1p((P + 1) // 8192), rtol=1e-6)
    np.testing.assert_allclose(factors(QueryScaling("ministral"), original_length=16384), 1 + 0.1 * np.log1p(P // 16384), rtol=1e-6)
    np.testing.assert_allclose(factors(QueryScaling("log_n", length=2048)), np.maximum(1, np.log(P + 1) / np.log(2048)), rtol=1e-6)
    np.testing.assert_allclose(factors(QueryScaling("ssmax", scale=0.5)), 0.5 * np.log(P + 1), rtol=1e-6)


def test_nope_layers_take_a_temperature():
    scheme = Nope(temperature=QueryScaling("llama4", length=4))
    assert scheme.spec(64).regions[0].q_rotation is None
    assert scheme.spec(64).query_scale(scheme.buffers(HEADS, 64)["query_scale"], POSITIONS)[0, 1] == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QueryScaling("llama5"), "did you mean 'llama4'"),
        (lambda: QueryScaling("llama4", scale=0.0), "scale=0.0"),
        (lambda: factors(QueryScaling("ministral")), "needs temperature.length"),
        (lambda: factors(QueryScaling("log_n", length=1)), "at least 2"),
        (lambda: Rope(temperature="llama4"), "must be a QueryScaling"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
