"""Merging partial results by their log-sum-exp, empty sides included, and sinks."""

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.dense import dense
from lcx.attention.partial import apply_sinks, merge
from lcx.core.batch import Index
from lcx.core.mask import Band, Mask
from tests.attention.cases import call

B, T, N, H = 2, 12, 3, 4


def draw():
    return [jax.random.normal(key, (B, T, N, H)) for key in jax.random.split(jax.random.key(0), 3)]


def index():
    dense_index = Index.dense(B, T)
    return dense_index.replace(segments=dense_index.segments.at[1, 8:].set(0))


def test_disjoint_bands_merge_to_the_whole():
    q, k, v = draw()

    def parts(q, k, v, *bands):
        return [call(dense, q, k, v, index(), index(), Mask(band=band), scale=0.5) for band in bands]

    def loss(bands):
        def f(q, k, v):
            results = parts(q, k, v, *bands)
            o, lse = results[0] if len(results) == 1 else merge(*results)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse * lse)), (o, lse)

        return jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)

    # The far band is empty for the first queries, both are for padding.
    got, (o, lse) = loss((Band(high=3), Band(low=3)))
    wanted, (o2, lse2) = loss((Band(),))
    np.testing.assert_allclose(o, o2, atol=1e-6)
    np.testing.assert_allclose(lse, lse2, atol=1e-6)
    assert np.isneginf(np.asarray(lse)[1, 8:]).all() and (np.asarray(o)[1, 8:] == 0).all()
    for one, two in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_sinks_enter_the_denominator():
    o, lse = draw()[0], jnp.zeros((B, T, N)).at[0, 0].set(-jnp.inf)
    o = o.at[0, 0].set(0.0)
    sinks = jnp.asarray([-1.0, 0.0, 2.0])
    merged, with_sink = apply_sinks(o, lse, sinks)
    np.testing.assert_allclose(merged, o * jax.nn.sigmoid(lse - sinks[None, None])[..., None], atol=1e-6)
    np.testing.assert_allclose(with_sink, jnp.logaddexp(lse, sinks[None, None]), atol=1e-6)
    gradient = jax.grad(lambda o, lse, sinks: jnp.sum(apply_sinks(o, lse, sinks)[0] ** 2), (0, 1, 2))(o, lse, sinks)
    assert all(np.isfinite(x).all() for x in gradient)
