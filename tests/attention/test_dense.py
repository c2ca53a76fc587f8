"""The oracle against a plain loop in float64, and its gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from lcx.attention.dense import dense
from lcx.core.batch import Index
from lcx.core.mask import Mask, visible
from lcx.positions.bias import AlibiBias
from tests.attention.cases import call

B, T, N, K, H = 2, 6, 4, 2, 3


def case():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K))
    index = Index.dense(B, T)
    return q, k, v, index.replace(segments=jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], jnp.int32))


def test_against_a_loop():
    q, k, v, index = case()
    mask, slopes = Mask(window=4), np.linspace(0.1, 0.4, N)
    with jax.enable_x64(True):
        params = {"slopes": jnp.asarray(slopes, jnp.float32)}
        options = {"bias": AlibiBias(), "bias_params": params, "scale": 0.7, "softcap": 2.0}
        o, lse = map(np.asarray, call(dense, *map(jnp.asarray, (q, k, v)), index, index, mask, **options))
    seen = np.asarray(visible(mask, index, index))
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(seen[b, t])
        if not keys.size:
            assert np.isneginf(lse[b, t, n]) and (o[b, t, n] == 0).all()
            continue
        raw = 0.7 * k[b, keys, n // (N // K)] @ q[b, t, n]
        logits = 2 * np.tanh(raw / 2) - np.float32(slopes[n]) * (t - keys)
        weights = np.exp(logits)
        np.testing.assert_allclose(o[b, t, n], weights @ v[b, keys, n // (N // K)] / weights.sum(), atol=1e-7)
        np.testing.assert_allclose(lse[b, t, n], np.log(weights.sum()), atol=1e-7)


def test_gradients_by_finite_differences():
    q, k, v, index = case()

    def f(q, k, v):
        o, lse = call(dense, q, k, v, index, index, Mask(), scale=0.7, softcap=2.0)
        return o, jnp.where(jnp.isneginf(lse), 0.0, lse)

    with jax.enable_x64(True):
        check_grads(f, tuple(map(jnp.asarray, (q, k, v))), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)
