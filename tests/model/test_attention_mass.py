"""Attention far back, against attention matrices that a decoder in NumPy computes from its queries and keys in float64."""

import dataclasses

import numpy as np
import pytest

from lcx.model import attention_mass
from lcx.model.attention_mass import chunk_mass, distant_mass
from lcx.model.config import ModelConfig
from tests.model.test_transformer import build

MODEL = ModelConfig(
    model_dim=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, pattern=("local", "global"), window=40
)
THETA, T, CHUNK, STRIDE = 500.0, 96, 8, 16


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_eps) * scale


def turned(x):
    """Rotary embedding of `[T, N, H]` as a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * THETA ** (-np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def logits_of_layers(params, tokens, config=MODEL):
    """Scaled scores `[N, T, T]` of each layer of a decoder, -inf where a query must not look."""
    w = {name: {k: np.asarray(v["kernel"], np.float64) for k, v in params["layers"][name].items()} for name in ("attention", "mlp")}
    scales = {name: np.asarray(params["layers"][name]["scale"], np.float64) for name in ("pre_attention_norm", "pre_mlp_norm")}
    x, found = np.asarray(params["embed"]["embedding"], np.float64)[tokens], []
    distance = np.arange(len(tokens))[:, None] - np.arange(len(tokens))
    for i, kind in enumerate(config.layer_kinds):
        y = normed(x, scales["pre_attention_norm"][i])
        q, k, v = (np.einsum("td,dnh->tnh", y, w["attention"][name][i]) for name in ("query", "key", "value"))
        k, v = (np.repeat(z, config.num_heads // config.num_kv_heads, axis=1) for z in (k, v))
        logits = np.einsum("tnh,snh->nts", turned(q), turned(k)) * config.head_dim**-0.5
        logits[:, (distance < 0) | ((distance >= config.window) if kind == "local" else False)] = -np.inf
        found.append(logits)
        x = x + np.einsum("nts,snh,nhd->td", softmax(logits), v, w["attention"]["out"][i])
        y = normed(x, scales["pre_mlp_norm"][i])
        gate = y @ w["mlp"]["gate"][i]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"][i])) @ w["mlp"]["down"][i]
    return found


def softmax(logits):
    top = logits.max(-1, keepdims=True)
    powers = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total)


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
        for layer, logits in enumerate(logits_of_layers(params, row)):
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
        weights = softmax(logits_of_layers(params, row[:n], config)[0])
        far = np.where(np.arange(n)[:, None] - np.arange(n) >= distance[b], weights, 0)
        np.testing.assert_allclose(mass[b], far.sum((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(squares[b], (far**2).sum((1, 2)), rtol=1e-5)
