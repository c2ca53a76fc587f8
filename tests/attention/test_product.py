"""The pairwise covering array of every kernel against dense; `full_product.py` runs all of it, `test_flash*.py` run flash."""

import itertools

import pytest

from lcx.attention.shard import KERNELS
from tests.attention.cases import OPTIONS, errors, within
from tests.covering import each_setting, pairs_of, pairwise
from tests.quick import mostly_slow

ROWS = pairwise(OPTIONS)
COSTS = {"one": 1, "self_extend": 2, "dual_chunk": 3}
QUICK = each_setting(ROWS, lambda row: COSTS[row["pieces"]] + (row["bias"] == "t5"))
"""Every option in few of the programs that take long to compile; `make test-all` has every pair of options."""


def test_covering_array_holds_every_pair():
    wanted = set()
    for (one, ones), (two, twos) in itertools.combinations(OPTIONS.items(), 2):
        wanted |= {frozenset({(one, x), (two, y)}) for x in ones for y in twos}
    assert set().union(*(pairs_of(row) for row in ROWS)) == wanted
    assert len(ROWS) <= 24
    assert {setting for row in QUICK for setting in row.items()} == {(name, x) for name, values in OPTIONS.items() for x in values}


@pytest.mark.parametrize("case", mostly_slow(ROWS, QUICK), ids=lambda case: "-".join(str(value) for value in case.values()))
def test_blockwise_equals_dense(case):
    found = errors(case, optimize=False)
    assert within(found), found


# All rows of the kernel for training; a few rows at once tell of the others what the rest tell in `make test-all`.
@pytest.mark.parametrize("kernel", sorted(KERNELS.keys() - {"dense", "blockwise", "flash"}))
@pytest.mark.parametrize(
    "case",
    [pytest.param(row, marks=[pytest.mark.slow] * (i % 4 > 0)) for i, row in enumerate(ROWS)],
    ids=lambda case: "-".join(str(value) for value in case.values()),
)
def test_other_kernels_equal_dense(case, kernel):
    found = errors(case, optimize=False, kernel=kernel)
    assert within(found), found
