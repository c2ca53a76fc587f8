"""The TPU kernel, interpreted on the host, against dense in value and in every gradient; on one device and in a ring."""

import pytest

from tests.attention.cases import errors, within

# Every option of `cases.OPTIONS` that the kernel serves, few programs, several kinds of rows each.
PLAIN = {"mask": "causal", "bias": "none", "pieces": "one", "grouping": "gqa", "softcap": None, "sink": False}
STRUCTURES = (
    PLAIN,
    {**PLAIN, "mask": "window", "bias": "alibi", "grouping": "mqa", "softcap": 5.0},
    {**PLAIN, "mask": "prefix", "pieces": "self_extend", "grouping": "mha", "sink": True},
    {**PLAIN, "mask": "full", "bias": "alibi", "pieces": "dual_chunk", "sink": True},
)
ROWS = (("none", "continuous"), ("packed", "reset"), ("shared", "reset"), ("padding", "continuous"))
CASES = [{**structure, "segments": segments, "positions": positions} for structure in STRUCTURES for segments, positions in ROWS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_flash_equals_dense(case):
    found = errors(case, optimize=False, kernel="flash")
    assert within(found), found
