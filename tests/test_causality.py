"""Who can influence whom, read from gradients: every positional scheme under every way of packing documents into rows.

Legend: R rows, T tokens in a row, D model.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.core.configs import build
from lcx.core.param_spec import initialize
from lcx.data.config import DataConfig
from lcx.data.loader import Loader
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.model.transformer import hidden_states
from lcx.positions.registry import SCHEMES
from tests.positions.test_registry import TEXTS
from tests.quick import mostly_slow

T = 56
"""More than two of dual chunk attention's chunks, and several of the windows."""

MODEL = ModelConfig(model_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=16)
METHODS = ("concat_then_split", "first_fit", "best_fit")
PACKINGS = list(itertools.product(METHODS, (False, True), (False, True), (False, True)))

# Schemes that do nothing at these settings.
IDENTITIES = {
    "linear": "linear:factor=1",
    "ntk": "ntk:factor=1",
    "dynamic": f"dynamic:factor=1,original_length={T}",
    "ntk_by_parts": f"ntk_by_parts:factor=1,original_length={T}",
    "yarn": f"yarn:factor=1,original_length={T}",
    "yarn of the paper": f"yarn:factor=1,original_length={T},variant=paper",
    "llama3": "llama3:factor=1",
    "longrope": f"longrope:short_factor={[1] * 8},long_factor={[1] * 8},original_length={T}",
    "proportional": "proportional:partial=1",
    "self_extend": "self_extend:window=8,group=1",
    "rerope": f"rerope:window={T}",
    "leaky_rerope": "leaky_rerope:window=8,k=1",
    "dual_chunk": f"dual_chunk:original_length={2 * T},chunk={T}",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A row of each packing as one batch, and the piece of a document that stands at each place (-1 padding, -2 anchor)."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for i, length in enumerate((9, 11, 14, 17, 21, 24, 8, 30, 70)):
        (folder / f"{i}.txt").write_bytes(rng.integers(97, 123, length).astype(np.uint8).tobytes())
    batches, documents = [], []
    for method, masked, reset, anchor in PACKINGS:
        packing = {"method": method, "mask_documents": masked, "reset_positions": reset, "shared_bos": anchor}
        part = {"kind": "text", "source": {"kind": "text", "path": str(folder / "*.txt")}, "packing": packing}
        config = build(DataConfig, {"tokenizer": "bytes+bos", "parts": {"text": part}, "heldout_fraction": 0.0})
        loader = Loader(config, T, 4, seed=1)
        text, (_, rows) = loader.parts[0], loader.addresses(0)
        # The row with the most documents, and padding behind them where there is one.
        best = max(range(4), key=lambda i: (len(spans := text.plan.spans(rows[i])), -sum(end - start for _, start, end in spans)))
        spans = text.plan.spans(rows[best])
        assert len(spans) >= 2
        place = np.full(T, -1)
        place[0] = -2 if anchor else -1
        at = int(anchor)
        for number, (_, start, end) in enumerate(spans):
            place[at : at + end - start] = number
            at += end - start
        batches.append(jax.tree.map(lambda x, best=best: x[best : best + 1], loader.batch(0)))
        documents.append(place)
    return jax.tree.map(lambda *rows: np.concatenate(rows), *batches), np.stack(documents)


def visible(documents: np.ndarray) -> np.ndarray:
    """Which places `[R, T, T]` may influence which, said from the packing alone: (influenced, influencing)."""
    order = np.arange(T)
    past, same = order[None, :] <= order[:, None], np.eye(T, dtype=bool)
    out = []
    for (_, masked, _, _), place in zip(PACKINGS, documents, strict=True):
        real = (place != -1)[:, None] & (place != -1)[None, :]
        # The anchor sees itself alone only because nothing stands before it.
        sees = (place[:, None] == place[None, :]) | (place == -2)[None, :] if masked else np.ones((T, T), bool)
        out.append(past & real & sees | same)
    return np.stack(out)


def build_model(text: str, vocab_size: int, kernel: str = "dense"):
    model = dataclasses.replace(MODEL, vocab_size=vocab_size)
    schemes = build_schemes(model, {"default": text})
    arch, buffers = build_architecture(model, ExecutionConfig(attention=kernel), schemes, T)
    return initialize(specs(model, schemes, T), jax.random.key(0)), buffers, arch


@functools.partial(jax.jit, static_argnums=2)
def reach(params, buffers, arch, batch: Batch) -> jax.Array:
    """How much each place's output moves with each place's embedding, `[R, T, T]`: (output, embedding).

    Every place has a row of the embedding table to itself, whatever its token.
    """
    own = batch.replace(tokens=jnp.arange(batch.tokens.size, dtype=jnp.int32).reshape(batch.tokens.shape))

    # Rows are apart, so one gradient serves all of them.
    def forward(embedding):
        return hidden_states({**params, "embed": {"embedding": embedding}}, buffers, arch, own)[0]

    states, pull = jax.vjp(forward, params["embed"]["embedding"])

    def at(place):
        (gradient,) = pull(jnp.where(jnp.arange(T)[None, :, None] == place, jnp.cos(states), 0.0))
        return jnp.abs(gradient).sum(-1)

    # One place after the other: XLA's CPU compiler of jax 0.10.2 gets a norm's gradient wrong when `vmap` takes it for many.
    return jax.lax.map(at, jnp.arange(T)).reshape(T, *batch.tokens.shape).swapaxes(0, 1)


def check(found: np.ndarray, documents: np.ndarray) -> None:
    allowed = visible(documents)
    for packing, row, may in zip(PACKINGS, np.asarray(found), allowed, strict=True):
        assert np.all(np.isfinite(row)), packing
        leaks = np.argwhere((row != 0) & ~may)
        assert not len(leaks), f"{packing}: the output at {leaks[0][0]} depends on the token at {leaks[0][1]}"
        deaf = np.argwhere((row == 0) & may)
        assert not len(deaf), f"{packing}: the output at {deaf[0][0]} does not depend on the token at {deaf[0][1]}"


QUICK = ("alibi", "self_extend", "learned")
"""One of each way to tell positions; rope, which is the fourth, is quick with the blockwise kernel."""


@pytest.mark.parametrize("name", mostly_slow(SCHEMES, QUICK))
def test_no_scheme_and_no_packing_leaks(name, packed):
    batch, documents = packed
    params, buffers, arch = build_model(TEXTS[name], vocab_size=batch.tokens.size)
    check(reach(params, buffers, arch, batch), documents)


@pytest.mark.parametrize("name", mostly_slow(["rope", "self_extend"], ["rope"]))
def test_nor_does_the_blockwise_kernel(name, packed):
    batch, documents = packed
    params, buffers, arch = build_model(TEXTS[name], batch.tokens.size, "blockwise")
    check(reach(params, buffers, arch, batch), documents)


def test_the_packings_are_what_they_say(packed):
    """Positions start again where they are to, and only there; so `reset without a mask` is really among the rows."""
    batch, documents = packed
    for (_, masked, reset, anchor), place, positions in zip(PACKINGS, documents, np.asarray(batch.positions), strict=True):
        starts = np.flatnonzero((place[1:] != place[:-1]) & (place[1:] >= 0)) + 1
        assert np.all(positions[starts] == (int(anchor) if reset else starts))
        assert len(starts) + (place[0] >= 0) >= 2, (masked, reset)


@functools.partial(jax.jit, static_argnums=2)
def states(params, buffers, arch, batch):
    return hidden_states(params, buffers, arch, batch)[0]


@pytest.mark.parametrize("name", IDENTITIES)
def test_factor_one_is_the_identity(name, packed):
    batch, _ = packed
    params, buffers, arch = build_model("rope", vocab_size=257)
    want = np.asarray(states(params, buffers, arch, batch))
    _, buffers, arch = build_model(IDENTITIES[name], vocab_size=257)
    got = np.asarray(states(params, buffers, arch, batch))
    real = np.asarray(batch.segments) != 0
    assert np.max(np.abs(got - want)[real]) <= 1e-6 * max(1.0, np.max(np.abs(want)))
