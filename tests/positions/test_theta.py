import json
import math

import numpy as np
import pytest

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.positions import theta

GRADIENT = {
    65536: (22.44e6, 4.13e6),
    262144: (283.5e6, 16.9e6),
    524288: (1.007e9, 34.2e6),
    1048576: (3.580e9, 69.1e6),
    4194304: (45.22e9, 283e6),
}
BOUNDS = {1024: 4.3e3, 2048: 1.6e4, 4096: 2.7e4, 8192: 8.4e4, 16384: 3.1e5, 32768: 6.4e5, 65536: 2.1e6, 131072: 7.8e6}
MORE_BOUNDS = {262144: 3.6e7, 524288: 6.4e7, 1048576: 5.1e8}


@pytest.mark.parametrize(("base", "dim", "length", "wanted"), [(5e5, 128, 8192, 70), (1e4, 128, 4096, 92), (1e4, 96, 2048, 62)])
def test_critical_dimension(base, dim, length, wanted):
    assert theta.critical_dimension(base, dim, length) == wanted
    assert theta.untrained_pairs(base, dim, length) == list(range(wanted // 2, dim // 2))


@pytest.mark.parametrize("target", GRADIENT)
def test_critical_and_ntk_base_of_the_published_schedule(target):
    critical, ntk = GRADIENT[target]
    assert theta.critical_base(5e5, 8192, target) == pytest.approx(critical, rel=5e-4)
    assert theta.ntk_base(5e5, target / 8192, 128) == pytest.approx(ntk, rel=5e-3)


def test_critical_base_keeps_the_critical_dimension():
    base = theta.critical_base(5e5, 8192, 1048576)
    assert theta.critical_dimension(base, 128, 1048576) == theta.critical_dimension(5e5, 128, 8192)


def test_lower_bounds_of_the_paper():
    found = theta.lower_bounds(list(BOUNDS), 128)
    for length, bound in zip(BOUNDS, found, strict=True):
        assert 0.65 <= bound / BOUNDS[length] <= 1.35, (length, bound)
        assert theta.usable_length(bound, 128, length) == length
    assert found == sorted(found)
    assert theta.lower_bound(8192, 128) == found[3]


def test_lower_bounds_of_the_paper_up_to_a_million():
    for length, bound in zip(MORE_BOUNDS, theta.lower_bounds(list(MORE_BOUNDS), 128), strict=True):
        assert 0.65 <= bound / MORE_BOUNDS[length] <= 1.35, (length, bound)


def test_sum_of_cosines_by_hand():
    assert theta.usable_length(100.0, 4, 1000) == 2
    assert theta.usable_length(1e4, 4, 1000) == 21
    assert theta.usable_length(1e4, 4, 15) == 15
    for base in (300.0, 5000.0):
        m = np.arange(3001)[:, None]
        negative = np.flatnonzero(np.cos(m * base ** (-2 * np.arange(16) / 32)).sum(axis=1) < 0)
        assert theta.usable_length(base, 32, 3000) == (negative[0] - 1 if negative.size else 3000)


def test_lower_bound_is_the_first_of_the_grid():
    bound = theta.lower_bound(300, 32)
    step = round(math.log(bound / theta.GRID_ANCHOR, theta.GRID_STEP))
    assert bound == pytest.approx(theta.GRID_ANCHOR * theta.GRID_STEP**step)
    assert theta.usable_length(bound, 32, 300) == 300
    assert all(theta.usable_length(theta.GRID_ANCHOR * theta.GRID_STEP**k, 32, 300) < 300 for k in range(step - 200, step))


def test_ladder_and_retries_stand_around_the_critical_base():
    critical = theta.critical_base(5e5, 8192, 65536)
    rungs = theta.ladder(5e5, 8192, 65536, 128)
    assert rungs == sorted(rungs) and rungs[0] == pytest.approx(theta.ntk_base(5e5, 8, 128))
    assert [rung / critical for rung in rungs[1:]] == pytest.approx([0.25, 0.5, 1, 2])
    assert [value / critical for value in theta.retries(5e5, 8192, 65536)] == pytest.approx([1, 2, 0.5, 0.25])


def test_schedule_is_the_same_from_stage_to_stage():
    stages = theta.schedule(8192, 5e5, 1048576, factor=8)
    assert [length for length, _ in stages] == [65536, 524288, 1048576]
    length, base = 8192, 5e5
    for next_length, next_base in stages:
        assert next_base == pytest.approx(theta.critical_base(base, length, next_length), rel=1e-9)
        length, base = next_length, next_base
    assert theta.schedule(256, 500.0, 256) == []


def test_report_is_plain_and_complete():
    report = theta.report(256, 500.0, 4096, 32)
    values = json.loads(json.dumps(configs.plain(report)))
    assert values["critical_dimension"] == theta.critical_dimension(500.0, 32, 256)
    assert [stage["length"] for stage in values["stages"]] == [1024, 4096]
    assert values["lower_bound"] == values["stages"][-1]["lower_bound"] == theta.lower_bound(4096, 32)
    assert len(report.rows()[0]) == len(report.HEADER)
    assert theta.report(256, 500.0, 4096, 32, with_lower_bound=False).lower_bound is None
    assert theta.report(256, 500.0, 256, 32).stages == ()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: theta.critical_base(-1.0, 8192, 65536), "theta=-1.0"),
        (lambda: theta.critical_dimension(1e4, 127, 8192), "head_dim=127"),
        (lambda: theta.critical_base(1e4, 4, 65536), "length=4"),
        (lambda: theta.critical_base(1e4, 7, 2**20), "length=7 with theta=10000 has a critical base of 1e445 at 1,048,576 tokens"),
        (lambda: theta.ntk_base(1e4, 0.5, 128), "factor=0.5"),
        (lambda: theta.schedule(8192, 5e5, 4096), "4096 is below"),
        (lambda: theta.schedule(8192, 5e5, 65536, factor=1), "factor=1"),
        (lambda: theta.report(8192, float("nan"), 65536, 128), "theta=nan"),
        (lambda: theta.lower_bound(1000, 2), "no base up to"),
    ],
)
def test_impossible_values(call, says):
    with pytest.raises(UserError, match=says):
        call()
