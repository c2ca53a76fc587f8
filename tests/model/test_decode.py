"""Generation with a cache equals taking the argmax of the whole forward pass again and again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Batch, Index
from lcx.core.errors import UserError
from lcx.model.config import ModelConfig, lay_out
from lcx.model.decode import empty_cache, extend, generate
from lcx.model.loss import logits
from lcx.model.transformer import hidden
from lcx.positions.schemes import parse
from tests.model.test_transformer import build

CONFIG = ModelConfig(
    model_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, pattern=("local", "global"), window=6
)
PROMPTS = [np.arange(7) * 5 % 256, np.arange(13) * 11 % 256]
NEW = 5


def by_hand(params, arrays, arch, prompt):
    """One program for all lengths: what stands behind the prompt is not seen from it."""

    @jax.jit
    def scores(batch):
        return logits(params, hidden(params, arrays, arch, batch), arch.config)

    row = list(prompt)
    for _ in range(NEW):
        padded = np.zeros((1, 25), np.int32)
        padded[0, : len(row)] = row
        row.append(int(jnp.argmax(scores(Batch.from_tokens(padded))[0, len(row) - 1])))
    return row[len(prompt) :]


@pytest.mark.parametrize("scheme", ["rope:theta=500", "nope", "alibi", "self_extend:theta=500,window=4,group=2", "sinusoidal"])
@pytest.mark.parametrize("chunk", [4, 64])
def test_generation_equals_the_whole_forward_pass(scheme, chunk):
    params, arrays, arch = build(CONFIG, {"default": scheme}, length=32)
    # Larger embeddings make the choice of each token depend on the prompt.
    params["embed"]["embedding"] = params["embed"]["embedding"] * 4
    got = generate(params, arrays, arch, PROMPTS, NEW, chunk=chunk)
    want = [by_hand(params, arrays, arch, prompt) for prompt in PROMPTS]
    np.testing.assert_array_equal(got, want)


def test_a_cache_of_other_frequencies_is_refused():
    params, arrays, arch = build(CONFIG, {"default": "rope:theta=500"}, length=32)
    cache = empty_cache(arch, arrays, 1, 8)
    _, other = lay_out(CONFIG, {kind: parse("rope:theta=900") for kind in CONFIG.kinds}, 32)
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UserError, match="other positional frequencies"):
        extend(params, other, arch, cache, one, Index(one, one, one + 1), 0)


def test_a_full_cache_is_refused():
    params, arrays, arch = build(CONFIG, {"default": "rope:theta=500"}, length=32)
    cache = empty_cache(arch, arrays, 1, 8)
    two = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UserError, match="tokens 7 to 9 do not fit a cache of 8 slots"):
        extend(params, arrays, arch, cache, two, Index(two, two, two + 1), 7)
