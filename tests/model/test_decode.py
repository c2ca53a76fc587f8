"""Generation with a cache equals taking the argmax of the whole forward pass again and again; draws, ends and what it is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core import host
from lcx.core.batch import Batch, Index
from lcx.core.errors import UserError
from lcx.model.architecture import build_architecture
from lcx.model.cache import empty_cache
from lcx.model.config import ModelConfig
from lcx.model.decode import _extend, decode_block, extend, generate, prefill, prepare
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.sampling import Sampling
from lcx.model.transformer import hidden_states
from lcx.positions.registry import from_config
from tests.model.test_transformer import build
from tests.quick import mostly_slow

CONFIG = ModelConfig(
    model_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, pattern=("local", "global"), window=6
)
PROMPTS = [np.arange(7) * 5 % 256, np.arange(13) * 11 % 256]
NEW = 5


def by_hand(params, buffers, arch, prompt):
    """One program for all lengths: what stands behind the prompt is not seen from it."""

    @jax.jit
    def scores(batch):
        return logits(params, hidden_states(params, buffers, arch, batch)[0], arch.config)

    row = list(prompt)
    for _ in range(NEW):
        padded = np.zeros((1, 25), np.int32)
        padded[0, : len(row)] = row
        row.append(int(jnp.argmax(scores(Batch.from_tokens(padded))[0, len(row) - 1])))
    return row[len(prompt) :]


SCHEMES = ("rope:theta=500", "nope", "alibi", "self_extend:theta=500,window=4,group=2", "sinusoidal")
# Here rope in several chunks, and biases, pieces and what is added to embeddings in one; `make test-all` has all in both ways.
QUICK = {(SCHEMES[0], 4), *((name, 64) for name in SCHEMES[2:])}
CHUNKED = [
    pytest.param(name, chunk, marks=[pytest.mark.slow] * ((name, chunk) not in QUICK)) for chunk in (64, 4) for name in SCHEMES
]


@pytest.mark.parametrize(("scheme", "chunk"), CHUNKED)
def test_generation_equals_the_whole_forward_pass(scheme, chunk):
    params, buffers, arch = build(CONFIG, {"default": scheme}, length=32)
    # Larger embeddings make the choice of each token depend on the prompt.
    params["embed"]["embedding"] = params["embed"]["embedding"] * 4
    got = generate(params, buffers, arch, PROMPTS, NEW, chunk=chunk)
    want = [by_hand(params, buffers, arch, prompt) for prompt in PROMPTS]
    np.testing.assert_array_equal(got, want)


BEGINNING = np.arange(18) * 7 % 256
FURTHER = ([3, *PROMPTS[0]], PROMPTS[0][:3], [3, 3, *PROMPTS[1]])
CONTINUED = [np.concatenate([BEGINNING, further]) for further in FURTHER]


@pytest.mark.parametrize(
    ("chunk", "continued"), [(16, ((0, 1, 2), (2,), (0, 1))), pytest.param(4, ((0,), (2, 2)), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("scheme", mostly_slow(SCHEMES, SCHEMES[:1]))
def test_a_prefix_is_computed_once_for_all_its_continuations(scheme, chunk, continued):
    """Padding stands before the prefix (of 18 in chunks of 4 or 16) and behind it, where windows of 6 reach across it."""
    params, buffers, arch = build(CONFIG, {"default": scheme}, length=64)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 4
    want = generate(params, buffers, arch, CONTINUED, NEW)
    prefix = prefill(params, buffers, arch, BEGINNING, slots=64, chunk=chunk)
    for prompts in continued:
        found = generate(params, buffers, arch, [CONTINUED[i] for i in prompts], NEW, chunk=chunk, prefix=prefix)
        np.testing.assert_array_equal(found, [want[i] for i in prompts])


def test_prompts_that_a_prefix_does_not_fit(model):
    prefix = prefill(*model, BEGINNING, slots=48, chunk=4)
    with pytest.raises(UserError, match="must begin with the 18 tokens of the prefix"):
        generate(*model, PROMPTS, NEW, chunk=4, prefix=prefix)
    with pytest.raises(UserError, match="at least one token behind the prefix"):
        generate(*model, [BEGINNING], NEW, chunk=4, prefix=prefix)
    with pytest.raises(UserError, match="slots=48 must be at least 49"):
        generate(*model, CONTINUED[:2], 21, chunk=4, prefix=prefix)
    with pytest.raises(UserError, match="differ by 13 tokens behind their prefix; prefill it with chunk=17"):
        generate(*model, CONTINUED, NEW, chunk=4, prefix=prefix)


@pytest.fixture(scope="module")
def model():
    params, buffers, arch = build(CONFIG, {"default": "rope:theta=500"}, length=64)
    params["embed"]["embedding"] = params["embed"]["embedding"] * 4
    return params, buffers, arch


DRAWN = Sampling(1.2, top_k=50, seed=1)
LONG = 21
"""More than two blocks."""


@pytest.mark.slow
def test_a_row_draws_the_same_in_any_company_and_chunks(model):
    together = generate(*model, PROMPTS, LONG, sampling=DRAWN)
    np.testing.assert_array_equal(generate(*model, PROMPTS[:1], LONG, sampling=DRAWN)[0], together[0])
    np.testing.assert_array_equal(generate(*model, PROMPTS, LONG, sampling=DRAWN, chunk=5), together)
    other = generate(*model, PROMPTS, LONG, sampling=Sampling(1.2, top_k=50, seed=2))
    assert not np.array_equal(together, other)


def test_prompts_of_any_length_share_their_programs(model):
    first = generate(*model, PROMPTS, NEW, chunk=8, slots=32)
    assert [list(row) for row in first] == [list(row) for row in generate(*model, PROMPTS, NEW)]
    extended, decoded = _extend._cache_size(), decode_block._cache_size()
    longer = [np.arange(3), np.arange(19) * 3]
    again = generate(*model, longer, NEW + 3, chunk=8, slots=32)
    assert (_extend._cache_size(), decode_block._cache_size()) == (extended, decoded)
    assert [list(row) for row in again] == [list(row) for row in generate(*model, longer, NEW + 3)]
    # Weights that are committed to a device, as those that are read from files, need one program for all chunks too.
    extended = _extend._cache_size()
    generate(jax.device_put(model[0], jax.devices()[0]), *model[1:], longer, NEW, chunk=8, slots=32)
    assert _extend._cache_size() == extended + 1
    with pytest.raises(UserError, match="slots=20 must be at least 21, for prompts in whole chunks of 8"):
        generate(*model, PROMPTS, NEW, chunk=8, slots=20)


def test_rows_end_behind_stop_ids_and_where_they_are_told_to(model):
    whole = generate(*model, PROMPTS, LONG, sampling=DRAWN)
    stop = int(whole[0][10])
    wanted = [row[: list(row).index(stop) + 1] if stop in row else row for row in whole]
    assert len(wanted[0]) <= 11
    heard, steps = {0: [], 1: []}, []

    def on_token(step, new):
        steps.append(step)
        for row, token in new.items():
            heard[row].append(token)

    found = generate(*model, PROMPTS, LONG, sampling=DRAWN, stop_ids=[stop, 300], on_token=on_token)
    for row in range(2):
        np.testing.assert_array_equal(found[row], wanted[row])
        np.testing.assert_array_equal(heard[row], wanted[row])
    assert steps == list(range(max(map(len, wanted))))
    # Both rows are ended by the caller, in the middle of a block.
    told = generate(
        *model, PROMPTS, LONG, sampling=DRAWN, on_token=lambda step, new: [row for at, row in ((3, 1), (9, 0)) if at == step]
    )
    for row, length in ((0, 10), (1, 4)):
        np.testing.assert_array_equal(told[row], whole[row][:length])


def test_timings_count_every_token(model):
    found = []
    generate(*model, PROMPTS, 4, report=found.append)
    (timings,) = found
    assert (timings.rows, timings.prompt_tokens, timings.new_tokens) == (2, 20, 8)
    assert min(timings.prefill_seconds, timings.decode_seconds, timings.setup_seconds) > 0
    assert timings.decode_rate == pytest.approx(6 / timings.decode_seconds)


@pytest.mark.parametrize("rows,dtype", [(1, "float32"), (3, "float32"), (1, "bfloat16")])
def test_decoding_copies_no_cache(rows, dtype, monkeypatch):
    """Neither weights nor cache: a step's memory is small beside both."""
    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: dtype == "bfloat16")
    params, buffers, arch = build(CONFIG, {"default": "rope:theta=500"}, length=4096)
    arch = dataclasses.replace(arch, execution=ExecutionConfig(compute_dtype=dtype))
    params = prepare(params, arch, stacked=False)
    cache = empty_cache(arch, buffers, rows, 4096, 512, stacked=False)
    token, one = jnp.zeros(rows, jnp.int32), jnp.int32(1)
    chosen = Sampling()
    step = decode_block.lower(
        params, buffers, arch, cache, token, token > 0, token[:1], token[:, None], one, one, one, chosen.numbers, chosen.spec
    )
    compiled = step.compile(compiler_options={"xla_backend_optimization_level": 3})
    memory, width = compiled.memory_analysis(), CONFIG.num_kv_heads * CONFIG.head_dim
    if dtype == "bfloat16":
        assert f"f32[{rows},4096,{width}]" not in compiled.as_text()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(cache)), "the cache is not written in place"
    # The float32 logits of all heads, a few times, and in bfloat16; keys and values of a layer in float32 are eight times as much.
    assert memory.temp_size_in_bytes < (6 if dtype == "float32" else 6.5) * rows * 4096 * CONFIG.num_heads * 4


def test_a_cache_of_other_frequencies_is_refused():
    params, buffers, arch = build(CONFIG, {"default": "rope:theta=500"}, length=32)
    cache = empty_cache(arch, buffers, 1, 8)
    _, other = build_architecture(CONFIG, ExecutionConfig(), {kind: from_config("rope:theta=900") for kind in CONFIG.kinds}, 32)
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UserError, match="other positional frequencies"):
        extend(params, other, arch, cache, one, Index(one, one, one + 1), 0)


def test_a_full_cache_is_refused():
    params, buffers, arch = build(CONFIG, {"default": "rope:theta=500"}, length=32)
    cache = empty_cache(arch, buffers, 1, 8)
    two = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UserError, match="tokens 7 to 9 do not fit into a cache of 8 slots"):
        extend(params, buffers, arch, cache, two, Index(two, two, two + 1), 7)
