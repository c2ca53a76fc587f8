"""The tiled loss equals the plain one in value and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.model import loss as losses
from lcx.model.architecture import Architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits, loss_sums, token_losses
from tests.compare import worst_error

B, T, D, V = 2, 24, 16, 50


def problem(tied=False, softcap=None, tile=1 << 25, dtype="float32"):
    config = ModelConfig(vocab_size=V, model_dim=D, tied_embeddings=tied, logit_softcap=softcap)
    execution = ExecutionConfig(loss_tile=tile, compute_dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"embed": {"embedding": jax.random.normal(keys[0], (V, D))}, "head": {"kernel": jax.random.normal(keys[1], (D, V))}}
    hidden = jax.random.normal(keys[2], (B, T, D), jnp.dtype(dtype))
    tokens = jax.random.randint(keys[3], (B, T + 1), 0, V)
    weights = np.random.default_rng(0).random((B, T + 1)).astype(np.float32)
    return params, hidden, Batch.from_tokens(tokens, weights), Architecture(config, execution, ())


def plain_sums(params, hidden, batch, arch):
    logp = jax.nn.log_softmax(logits(params, hidden, arch.config))
    lse = jax.nn.logsumexp(logits(params, hidden, arch.config), axis=-1)
    nll = -jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * batch.loss_weights), jnp.sum(lse**2 * batch.loss_weights)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tile", [pytest.param(1 << 25, marks=pytest.mark.slow), B * T * 20, B * T * 7])
def test_equals_the_plain_loss(tied, softcap, tile):
    """In one tile, in three of which the last is filled up (17 + 17 + 16 entries), and in ten equal ones."""
    params, hidden, batch, arch = problem(tied, softcap, tile)

    def tiled(params, hidden):
        sums = loss_sums(params, hidden, batch, arch)
        return sums.nll + 0.01 * sums.z, (sums.nll, sums.z)

    def plain(params, hidden):
        nll, z = plain_sums(params, hidden, batch, arch)
        return nll + 0.01 * z, (nll, z)

    (_, got), got_grads = jax.value_and_grad(tiled, argnums=(0, 1), has_aux=True)(params, hidden)
    (_, want), want_grads = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(params, hidden)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    error, where = worst_error(got_grads, want_grads)
    assert error <= 1e-5, where


def test_counts_correct_targets():
    params, hidden, batch, arch = problem(tile=B * T * 16)
    best = jnp.argmax(logits(params, hidden, arch.config), axis=-1)
    mixed = jnp.where(jnp.arange(T)[None] % 2 == 0, best, (best + 1) % V)
    losses = token_losses(params, hidden, mixed, arch)
    np.testing.assert_array_equal(losses.correct, np.broadcast_to(np.arange(T) % 2 == 0, (B, T)))


@pytest.mark.parametrize(("least", "tile"), [(10, f"[{B},{T},10]"), (losses.LEAST_ENTRIES, f"[{B},2,{V}]")])
def test_no_array_of_all_logits(least, tile, monkeypatch):
    """Cut along the vocabulary, or along the tokens where tiles of the vocabulary would be narrow."""
    monkeypatch.setattr(losses, "LEAST_ENTRIES", least)
    params, hidden, batch, arch = problem(tile=B * T * 10)

    def loss(params, hidden):
        return loss_sums(params, hidden, batch, arch).nll

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, hidden))
    assert tile in text
    assert f"[{B},{T},{V}]" not in text


@pytest.mark.parametrize("trained", [False, True])
def test_tiles_of_a_tied_table_are_no_copies(trained, monkeypatch):
    """The program holds nothing of its size besides its results."""
    monkeypatch.setattr(losses, "LEAST_ENTRIES", 128)
    vocab, dim = 4096, 256
    config = ModelConfig(vocab_size=vocab, model_dim=dim, tied_embeddings=True)
    arch = Architecture(config, ExecutionConfig(loss_tile=16 * 128), ())

    def loss(table, hidden):
        return token_losses({"embed": {"embedding": table}}, hidden, jnp.zeros((1, 16), jnp.int32), arch).nll.sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1) if trained else 1))
    found = grad.lower(jnp.zeros((vocab, dim)), jnp.zeros((1, 16, dim))).compile().memory_analysis()
    assert found.temp_size_in_bytes < 4 * vocab * dim / 4


def test_bfloat16_states_keep_a_float32_loss():
    params, hidden, batch, arch = problem(dtype="bfloat16")
    exact = plain_sums(params, hidden.astype(jnp.float32), batch, arch)[0]
    got = loss_sums(params, hidden, batch, arch).nll
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=2e-3)
