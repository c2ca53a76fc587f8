"""Counts and what is counted."""

import pytest

from lcx.core.numbers import counted


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0, "shard"), "0 shards"),
        ((1, "shard"), "1 shard"),
        ((4096, "shard"), "4,096 shards"),
        ((1, "process", "processes"), "1 process"),
        ((2, "process", "processes"), "2 processes"),
    ],
)
def test_one_is_singular(given, text):
    assert counted(*given) == text
