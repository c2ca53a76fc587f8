import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.positions.absolute import Learned, Nope, Sinusoidal
from lcx.positions.scheme import Heads, SchemeSpec

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16, model_dim=8)


def test_nope_does_nothing():
    assert Nope().spec(64) == SchemeSpec() and Nope().buffers(HEADS, 64) == {} and Nope().param_specs(HEADS, 64) == {}
    assert SchemeSpec().rotations == ()


def test_sinusoids():
    scheme = Sinusoidal(scale=0.5)
    positions = jnp.asarray([[0, 1, 7, 1000]], jnp.int32)
    out = scheme.spec(64).embed({}, scheme.buffers(HEADS, 64)["embed"], positions, 8)
    angle = np.asarray(positions)[0, :, None] * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(out[0, :, 0::2], 0.5 * np.sin(angle), atol=1e-7)
    np.testing.assert_allclose(out[0, :, 1::2], 0.5 * np.cos(angle), atol=1e-7)
    with pytest.raises(UserError, match="even model_dim, got 7"):
        scheme.buffers(Heads(1, 1, 7, 7), 64)


def test_learned_table():
    scheme = Learned(max_length=16)
    params = initialize(scheme.param_specs(HEADS, 16), jax.random.key(0))
    embed = scheme.spec(16).embed
    positions = jnp.asarray([[0, 15, 3]], jnp.int32)
    np.testing.assert_array_equal(embed(params, {}, positions, 8)[0], params["table"][positions[0]])
    assert np.all(np.isnan(embed(params, {}, positions + 1, 8)[0, 1]))
    grad = jax.grad(lambda p: jnp.sum(embed(p, {}, positions, 8)))(params)["table"]
    assert np.asarray(grad).sum() == 3 * 8 and np.all(np.isfinite(grad))
    with pytest.raises(UserError, match="is below length 17"):
        scheme.spec(17)
