"""The visibility rule token by token, and that decisions by blocks never contradict it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import PADDING, SHARED, Index
from lcx.core.mask import Band, Mask, bounds, may_see, sees_all, visible

MASKS = [
    Mask(causal=causal, window=window, prefix=prefix, band=band)
    for causal, window, prefix, band in itertools.product(
        (True, False), (None, 5), (True, False), (Band(), Band(high=4), Band(low=2, high=9), Band(low=1, high=2, chunk=6))
    )
]


def by_hand(mask, q, k):
    """One pair of tokens, each (order, position, segment, prefix)."""
    (q_order, q_position, q_segment, _), (k_order, k_position, k_segment, prefix) = q, k
    if PADDING in (q_segment, k_segment) or (q_segment != k_segment and k_segment != SHARED):
        return False
    reach = not (mask.causal and k_order > q_order)
    reach = reach and (mask.window is None or abs(q_order - k_order) < mask.window)
    reach = reach or (mask.prefix and prefix)
    chunk = mask.band.chunk
    distance = q_position // chunk - k_position // chunk if chunk > 1 else q_order - k_order
    low, high = mask.band.low, mask.band.high
    return bool(reach and (low is None or distance >= low) and (high is None or distance < high))


def random_index(rng, rows=3, length=24, permute=False):
    """Documents of random length with reset positions, some padding, some shared tokens, some prefixes."""
    order = np.broadcast_to(np.arange(length), (rows, length)).copy()
    segments = 1 + np.cumsum(rng.random((rows, length)) < 0.1, axis=1)
    segments[0, :] = 1
    segments[rows - 1, length - 7 :] = PADDING
    segments[1, 0] = SHARED
    positions = order % 13
    prefix = (rng.random((rows, length)) < 0.1).astype(int)
    if permute:
        perm = rng.permutation(length)
        order, segments, positions, prefix = (x[:, perm] for x in (order, segments, positions, prefix))
    return Index(*(jnp.asarray(x, jnp.int32) for x in (order, positions, segments, prefix)))


@pytest.mark.parametrize("mask", MASKS[::5], ids=str)
def test_visible_is_the_rule(mask):
    index = random_index(np.random.default_rng(1), length=14)
    tokens = np.stack([index.order, index.positions, index.segments, index.is_prefix], axis=-1)
    expected = [[[by_hand(mask, q, k) for k in row] for q in row] for row in tokens]
    np.testing.assert_array_equal(visible(mask, index, index), expected)


def decide(mask, index, block):
    """(visible, may_see, sees_all) with the first by blocks as `[B, q blocks, k blocks, pairs]`."""
    at = bounds(index, block)
    q, k = jax.tree.map(lambda x: x[:, :, None], at), jax.tree.map(lambda x: x[:, None, :], at)
    rows, length = index.order.shape
    seen = visible(mask, index, index).reshape(rows, length // block, block, length // block, block)
    return (
        seen.transpose(0, 1, 3, 2, 4).reshape(rows, length // block, length // block, -1),
        may_see(mask, q, k),
        sees_all(mask, q, k),
    )


@pytest.mark.parametrize("permute", [False, True])
def test_blocks_never_contradict_tokens(permute):
    index = random_index(np.random.default_rng(2), permute=permute)
    for mask in MASKS[permute::3]:
        seen, some, whole = (np.asarray(x) for x in decide(mask, index, 4))
        assert not (seen.any(axis=-1) & ~some).any(), mask
        assert not (whole & ~seen.all(axis=-1)).any(), mask


def test_blocks_decide_sharply_for_one_ordinary_document():
    index = Index.dense(3, 24)
    for mask in (Mask(), Mask(window=8), Mask(causal=False), Mask(band=Band(low=8))):
        seen, some, whole = (np.asarray(x) for x in decide(mask, index, 4))
        np.testing.assert_array_equal(some, seen.any(axis=-1))
        np.testing.assert_array_equal(whole, seen.all(axis=-1))
