"""Blockwise attention on its own: log-sum-exp, grouping, skipping, memory, precision, permutation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.blockwise import _rounded_exp, blockwise
from lcx.attention.dense import MASKED, dense
from lcx.attention.spec import Blocks
from lcx.attention.tiles import fold, unfold, visited_pairs
from lcx.core.batch import Index
from lcx.core.mask import Band, Mask, visible
from lcx.positions.bias import T5Bias
from tests.attention.cases import call

B, T, S, N, K, H = 4, 27, 41, 4, 2, 8


def draw(dtype=jnp.float32, q_tokens=T, k_tokens=S):
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = (B, q_tokens, N, H), (B, k_tokens, K, H), (B, k_tokens, K, H), (B, q_tokens, N, H), (B, q_tokens, N)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def chunk_index():
    """Queries from the middle of the keys' range, row 1 with padding on both sides and row 2 with keys of another document only."""
    k = Index.dense(B, S)
    q = k.slice(9, T)
    q_segments = q.segments.at[1, -5:].set(0)
    k_segments = k.segments.at[1, :30].set(0).at[2].set(2)
    return q.replace(segments=q_segments), k.replace(segments=k_segments)


def gradients(kernel, q, k, v, do, dlse, q_index, k_index, **options):
    def loss(q, k, v, params):
        o, lse = kernel(q, k, v, q_index, k_index, bias_params=params, **options)
        return jnp.sum(o * do) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * dlse), (o, lse)

    table = jax.random.normal(jax.random.key(2), (8, N))
    step = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
    # The oracle runs op by op: cheaper than a compile for each set of options.
    grads, (o, lse) = (step if kernel.args == (dense,) else jax.jit(step))(q, k, v, {"table": table})
    return o, lse, jax.tree.leaves(grads)


@pytest.mark.slow
@pytest.mark.parametrize("rows,heads,bias", [(2, 1, None), (1, 2, T5Bias(8, 20, True))])
def test_chunk_with_lse_cotangent_and_empty_rows(rows, heads, bias):
    q_index, k_index = chunk_index()
    options = {"mask": Mask(window=13), "scale": 0.3, "softcap": 3.0, "bias": bias}
    tiled = functools.partial(call, blockwise, blocks=Blocks(8, 16, rows, heads))
    o, lse, got = gradients(tiled, *draw(), q_index, k_index, **options)
    o2, lse2, wanted = gradients(functools.partial(call, dense), *draw(), q_index, k_index, **options)
    np.testing.assert_allclose(o, o2, atol=2e-6)
    np.testing.assert_allclose(lse, lse2, atol=2e-6)
    for one, two in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1.0, float(jnp.abs(two).max())))
        assert np.isfinite(one).all()
    empty = ~np.asarray(visible(options["mask"], q_index, k_index)).any(axis=2)
    assert empty[2].all() and 0 < empty[1].sum() < T
    assert np.isneginf(np.asarray(lse)[empty]).all() and (np.asarray(o)[empty] == 0).all()
    assert (np.asarray(got[0])[empty] == 0).all() and (np.asarray(got[1])[2] == 0).all()


def test_order_may_come_permuted():
    index = Index.dense(B, S)
    index = index.replace(segments=index.segments + index.order // 23, positions=index.order % 23)
    perm = np.random.default_rng(0).permutation(S)
    run = jax.jit(functools.partial(call, blockwise, mask=Mask(window=17), scale=0.4, blocks=Blocks(16, 8, 2, 1)))
    q, k, v, *_ = draw(q_tokens=S)
    o, lse = run(q, k, v, index, index)
    q, k, v, moved = jax.tree.map(lambda x: x[:, perm], (q, k, v, index))
    o2, lse2 = run(q, k, v, moved, moved)
    np.testing.assert_allclose(o[:, perm], o2, atol=2e-6)
    np.testing.assert_allclose(lse[:, perm], lse2, atol=2e-6)


@pytest.mark.parametrize("platform,exact", [("tpu", 1e-5), ("cpu", 2**-8)])
def test_bfloat16_inputs_against_a_float32_oracle(platform, exact):
    """Bounds: two units in the last place of bfloat16 (2⁻⁸) of the largest value of each array, one for the output.

    On a CPU the log-sum-exp is that of rounded probabilities.
    """
    index = Index.dense(B, S)
    inputs = draw(jnp.bfloat16, q_tokens=S)
    inputs[4] = inputs[4].astype(jnp.float32)
    tiled = functools.partial(call, blockwise, blocks=Blocks(16, 16), platform=platform)
    o, lse, got = gradients(tiled, *inputs, index, index, mask=Mask(), scale=0.35)
    o2, lse2, wanted = gradients(
        functools.partial(call, dense), *(x.astype(jnp.float32) for x in inputs), index, index, mask=Mask(), scale=0.35
    )
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32 and got[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(o.astype(jnp.float32), o2, atol=2**-8 * float(jnp.abs(o2).max()))
    np.testing.assert_allclose(lse, lse2, atol=exact)
    for one, two in zip(got[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), two, atol=2**-7 * float(jnp.abs(two).max()))


@pytest.mark.parametrize("softcap,bias", [(None, None), (3.0, T5Bias(8, 20, True))])
def test_rounded_probabilities_with_empty_rows(softcap, bias):
    """As `test_chunk_with_lse_cotangent_and_empty_rows`, to the bounds of bfloat16."""
    q_index, k_index = chunk_index()
    options = {"mask": Mask(window=13), "scale": 0.3, "softcap": softcap, "bias": bias}
    tiled = functools.partial(call, blockwise, blocks=Blocks(8, 16, 1, 2), platform="cpu")
    inputs = draw(jnp.bfloat16)
    inputs[4] = inputs[4].astype(jnp.float32)
    o, lse, got = gradients(tiled, *inputs, q_index, k_index, **options)
    inputs = [x.astype(jnp.float32) for x in inputs]
    o2, lse2, wanted = gradients(functools.partial(call, dense), *inputs, q_index, k_index, **options)
    for one, two in zip((o, lse, *got), (o2, lse2, *wanted), strict=True):
        one, two = np.asarray(one.astype(jnp.float32)), np.asarray(two)
        seen = np.isfinite(two)
        assert (one[~seen] == two[~seen]).all()
        np.testing.assert_allclose(one[seen], two[seen], atol=2**-7 * np.abs(two[seen]).max())
    empty = ~np.asarray(visible(options["mask"], q_index, k_index)).any(axis=2)
    assert empty.any() and (np.asarray(o)[empty] == 0).all() and (np.asarray(got[0])[empty] == 0).all()


def test_rounded_probabilities_keep_what_is_not_a_number():
    index, (q, k, v, *_) = Index.dense(B, S), draw(jnp.bfloat16, q_tokens=S)
    q = q.at[1, 7, 2, 0].set(jnp.nan)
    o, lse = call(blockwise, q, k, v, index, index, Mask(), scale=0.35, blocks=Blocks(16, 16), platform="cpu")
    wrong = np.isnan(np.asarray(o.astype(jnp.float32))).any(axis=-1)
    assert wrong[1, 7, 2] and wrong.sum() == 1 and (np.isnan(lse) == wrong).all()


def test_exponentials_in_bfloat16():
    x = np.concatenate([-np.geomspace(1e-6, 87, 10001), [0.0]]).astype(np.float32)
    got = np.asarray(jax.jit(_rounded_exp)(x).astype(jnp.float32), np.float64)
    # Half a unit in the last place, and the polynomial's error.
    np.testing.assert_allclose(got, np.exp(x.astype(np.float64)), rtol=2**-8 + 1e-4)
    assert got[-1] == 1.0 and np.asarray(_rounded_exp(jnp.asarray([-90.0, MASKED, -jnp.inf]))).tolist() == [0.0, 0.0, 0.0]


def temporary_bytes(length, mask):
    """Of forward and backward at 1 row, 2 heads of 16."""
    array = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    where = Index(*(jax.ShapeDtypeStruct((1, length), jnp.int32) for _ in range(3)))

    def step(q, k, v, do, where):
        kernel = functools.partial(call, blockwise, mask=mask, scale=0.25, blocks=Blocks(256, 256, 1, 1))
        return jax.vjp(lambda q, k, v: kernel(q, k, v, where, where)[0], q, k, v)[1](do)

    memory = jax.jit(step).lower(array, array, array, array, where).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_grows_linearly():
    short, long = (temporary_bytes(length, Mask()) for length in (16384, 65536))
    assert long <= 4.02 * short
    assert long < 16 * (65536 * 2 * 16 * 4)


def share(mask, length, block, index=None):
    index = index or Index.dense(1, length)
    visited, total = visited_pairs(mask, index, index, block, block)
    return int(visited) / total


def test_visits():
    assert share(Mask(causal=False), 512, 16) == 1.0
    assert share(Mask(), 512, 16) == 33 / 64 <= 0.53
    assert share(Mask(window=16), 512, 16) == (2 * 32 - 1) / 32**2
    assert share(Mask(band=Band(low=256)), 512, 16) < 0.15
    packed = Index.dense(1, 512)
    packed = packed.replace(segments=1 + packed.order // 64)
    assert share(Mask(), 512, 16, packed) == 8 * 10 / 32**2
    padded = Index.dense(1, 512)
    padded = padded.replace(segments=jnp.where(padded.order < 256, 1, 0))
    assert share(Mask(), 512, 16, padded) == 16 * 17 / 2 / 32**2


def test_fold_and_back():
    x = jax.random.normal(jax.random.key(0), (4, 11, 6, 3))
    blocks = Blocks(4, 4, rows=2, heads=1)
    tiles = fold(x, 4, blocks, kv_heads=2)
    assert tiles.shape == (4, 3, 2, 1, 12, 3)
    np.testing.assert_array_equal(unfold(tiles, 4, blocks, x.shape), x)


def test_blocks_that_do_not_divide_are_refused():
    index = Index.dense(B, S)
    q, k, v, *_ = draw(q_tokens=S)
    with pytest.raises(ValueError, match="4 rows, 4 heads and 2 KV heads"):
        call(blockwise, q, k, v, index, index, Mask(), scale=1.0, blocks=Blocks(8, 8, rows=3))
    with pytest.raises(ValueError, match="a bias needs all heads"):
        call(blockwise, q, k, v, index, index, Mask(), scale=1.0, blocks=Blocks(8, 8), bias=T5Bias(8, 20, True))
