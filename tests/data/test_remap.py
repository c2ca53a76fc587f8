import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.remap import pose, randomized


def test_pose_keeps_order_and_runs():
    skips = []
    for seed in range(200):
        out = pose(np.arange(10, 74), np.random.default_rng(seed), 256)
        steps = np.diff(out)
        assert out.dtype == np.int32 and out[0] == 10 and out[-1] < 10 + 256
        assert np.all(steps >= 1) and np.sum(steps > 1) <= 1
        skips.append(out[-1] - 73)
    assert min(skips) < 20 and max(skips) > 172 and abs(np.mean(skips) - 96) < 15


def test_pose_with_more_chunks_and_at_its_own_length():
    out = pose(np.arange(64), np.random.default_rng(0), 10_000, chunks=5)
    assert np.sum(np.diff(out) > 1) == 4 and out[-1] < 10_000
    assert np.array_equal(pose(np.arange(64), np.random.default_rng(0), 64), np.arange(64))
    assert np.array_equal(pose(np.arange(3), np.random.default_rng(1), 99, chunks=1), np.arange(3))


def test_randomized_is_a_sorted_sample():
    out = randomized(64, np.random.default_rng(0), 2**31)
    assert out.dtype == np.int32 and np.all(np.diff(out) > 0) and out[-1] > 2**28
    assert np.array_equal(randomized(64, np.random.default_rng(0), 64), np.arange(64))
    assert np.array_equal(randomized(5, np.random.default_rng(3), 50), randomized(5, np.random.default_rng(3), 50))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda rng: pose(np.arange(64), rng, 63), "target_length=63"),
        (lambda rng: pose(np.arange(4), rng, 63, chunks=5), "chunks=5"),
        (lambda rng: randomized(64, rng, 63), "max_position=63"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(UserError, match=says):
        make(np.random.default_rng(0))
