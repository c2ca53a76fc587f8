"""Attention far back, against attention matrices that a decoder in NumPy computes from its queries and keys in float64."""

import dataclasses

import numpy as np
import pytest

from lcx.model import attention_mass
from lcx.model.attention_mass import chunk_mass, distant_mass
from tests.model.numpy_decoder import MODEL, THETA, forward, softmax
from tests.model.test_transformer import build

T, CHUNK, STRIDE = 96, 8, 16


@pytest.fixture(scope="module")
def model():
    return build(MODEL, {"default": f"rope:theta={THETA}"}, T)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 256, (2, T)).astype(np.int32)


@pytest.mark.parametrize("elements", [1 << 24, 2 * 4 * T * 3])
def test_mass_of_chunks(model, rows, elements, monkeypatch):
    monkeypatch.setattr(attention_mass, "BLOCK_ELEMENTS", elements)
    params, buffers, arch = model
    # The program is kept by its static arguments, among which blocks are not.
    attention_mass.chunk_mass.clear_cache()
    found = np.asarray(chunk_mass(params, buffers, rows, arch, CHUNK, STRIDE))
    assert found.shape == (2, 5, T // STRIDE, T // CHUNK)
    for b, row in enumerate(rows):
        for layer, logits in enumerate(forward(params, row)[0]):
            for c in range(T // STRIDE):
                start, own = c * STRIDE, logits[:, c * STRIDE : c * STRIDE + CHUNK].copy()
                own[..., :CHUNK], own[..., start:] = -np.inf, -np.inf
                wanted = softmax(own).mean(0).sum(0).reshape(-1, CHUNK).sum(1)
                np.testing.assert_allclose(found[b, layer, c], wanted, atol=2e-5)
    # A window of 40 hides what lies further back, in the layers that have one.
    assert np.all(found[:, ::2, -1, :2] == 0) and np.all(found[:, 1::2, -1, 1:10] > 0)


@pytest.mark.parametrize("elements", [1 << 24, 2 * 4 * T * 5])
@pytest.mark.parametrize("kind", ["local", "global"])
def test_distant_mass(rows, kind, elements, monkeypatch):
    monkeypatch.setattr(attention_mass, "BLOCK_ELEMENTS", elements)
    attention_mass.distant_mass.clear_cache()
    config = dataclasses.replace(MODEL, pattern=(kind,))
    params, buffers, arch = build(config, {"default": f"rope:theta={THETA}"}, T)
    lengths, distance = np.asarray([T, 70]), np.asarray([24, 18])
    mass, squares = (np.asarray(x, np.float64).sum(1) for x in distant_mass(params, buffers, rows, lengths, distance, arch))
    for b, row in enumerate(rows):
        n = lengths[b]
        weights = softmax(forward(params, row[:n], config)[0][0])
        far = np.where(np.arange(n)[:, None] - np.arange(n) >= distance[b], weights, 0)
        np.testing.assert_allclose(mass[b], far.sum((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(squares[b], (far**2).sum((1, 2)), rtol=1e-5)
