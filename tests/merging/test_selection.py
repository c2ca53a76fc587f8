"""The k largest, against a stable sort of all numbers."""

import numpy as np
import pytest

from lcx.merging import selection, tensors
from lcx.merging.selection import largest
from lcx.merging.tensors import Tensor
from tests.merging.arrays import drawn, rows_of

KINDS = {
    "normal": drawn(40, 30),
    "rounded": np.round(drawn(40, 30)),
    "zeros": np.zeros((40, 30), np.float32),
    "mostly zeros": np.where(np.arange(1200).reshape(40, 30) % 17 == 3, drawn(40, 30), 0),
    "rows of different size": drawn(40, 30) * 10.0 ** np.arange(-20, 20)[:, None].astype(np.float32),
    "tiny": drawn(40, 30, scale=1e-42),
}


@pytest.mark.parametrize("sample", [1 << 20, 8, 1])
@pytest.mark.parametrize("k", [0, 1, 60, 599, 1199, 1200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_largest_are_those_of_a_sort(kind, k, sample, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 100)
    monkeypatch.setattr(selection, "SAMPLE", sample)
    monkeypatch.setattr(selection, "SAMPLED_BLOCKS", min(sample, 64))
    array = KINDS[kind]
    tensor = Tensor("w", array.shape, [rows_of(array)])
    chosen = largest(tensor, k, lambda block: np.abs(block.models[0]))
    masks = list(tensor.over(lambda block: chosen.mask(np.abs(block.models[0]), block.index)))
    wanted = np.zeros(array.size, bool)
    wanted[np.argsort(-np.abs(array).reshape(-1), kind="stable")[:k]] = True
    assert np.array_equal(np.concatenate(masks).reshape(-1), wanted)


def test_a_sample_that_misleads_is_noticed(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 100)
    monkeypatch.setattr(selection, "SAMPLED_BLOCKS", 1)
    array = KINDS["rows of different size"]
    tensor = Tensor("w", array.shape, [rows_of(array)])

    def measure(block):
        return np.abs(block.models[0])

    low, high = selection._guess(tensor, 0.25, measure)
    threshold = largest(tensor, 300, measure).threshold
    assert not low <= threshold <= high
    assert threshold == np.sort(np.abs(array).reshape(-1))[-300]
