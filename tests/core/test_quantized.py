"""Quantised kernels against qwix and against the definition of NormalFloat4."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from lcx.adapters.lora import LoraConfig
from lcx.core import quantized
from lcx.core.errors import UserError

KERNEL = np.random.default_rng(0).normal(size=(2, 96, 3, 10)).astype(np.float32)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("size", [96, 95])
def test_the_same_numbers_as_qwix(kind, size):
    kernel = jnp.asarray(KERNEL[:, :size])
    found, block = quantized.quantize(kernel, kind, 1), quantized.block_of(size)
    theirs = qwix.dequantize(qwix.quantize(kernel, kind, channelwise_axes=(0, 2, 3), tiled_axes={1: block}))
    assert found.shape == kernel.shape and found.scale.shape == (2, size // block, 3, 10)
    np.testing.assert_array_equal(quantized.dense(found, jnp.float32), theirs)
    layer = jax.tree.map(lambda x: x[1], found)
    assert layer.shape == kernel.shape[1:]
    np.testing.assert_array_equal(quantized.dense(layer, jnp.bfloat16), theirs[1].astype(jnp.bfloat16))
    assert found.values.nbytes + found.scale.nbytes == kernel.size * quantized.bytes_of(kind, size)


def test_int8_is_off_by_half_a_step_at_most():
    found = quantized.quantize(jnp.asarray(KERNEL), "int8", 1)
    step = np.repeat(np.abs(KERNEL.reshape(2, 2, 48, 3, 10)).max(axis=2) / 127.5, 48, axis=1)
    assert np.all(np.abs(quantized.dense(found, np.float32) - KERNEL) <= 0.5001 * step)


def test_nf4_takes_the_nearest_of_its_values():
    found = quantized.quantize(jnp.asarray(KERNEL), "nf4", 1)
    largest = np.repeat(np.abs(KERNEL.reshape(2, 2, 48, 3, 10)).max(axis=2), 48, axis=1).astype(np.float64)
    values = np.array(quantized.NF4)
    nearest = values[np.argmin(np.abs(KERNEL[..., None] / largest[..., None] - values), axis=-1)] * largest
    np.testing.assert_allclose(quantized.dense(found, np.float32), nearest, rtol=1e-6)
    assert len(set(quantized.NF4)) == 16 and values[7] == 0 and values[0] == -1 and values[15] == 1


@pytest.mark.parametrize(("size", "block"), [(576, 64), (96, 48), (1536, 64), (24, 24), (67, 1), (100, 50), (64, 64)])
def test_blocks_divide(size, block):
    assert quantized.block_of(size) == block


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^lora.base_dtype=nf4 needs the qwix library; .* pip install -e '.\[qlora\]'$"):
        LoraConfig(rank=2, base_dtype="nf4")
