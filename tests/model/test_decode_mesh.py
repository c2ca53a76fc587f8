"""Prefill and decoding on a context mesh: tokens and logits of one device, in caches split over it, in rings overwritten."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.core.batch import Batch, Index
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig
from lcx.model.cache import collect, deal, empty_cache
from lcx.model.config import ModelConfig
from lcx.model.decode import _extend, extend, generate
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.transformer import hidden_states, unstack
from tests.model.decode_cases import build, by_chunks, forward, furthest, place
from tests.quick import mostly_slow

CONFIG = ModelConfig(
    model_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, pattern=("local", "global"), window=6
)
PROMPTS = [np.arange(9) * 5 % 256, np.arange(37) * 11 % 256]
NEW, CHUNK, LENGTH = 6, 8, 48
SELF_EXTEND = "self_extend:theta=500,window=4,group=2"

CASES = {
    "no context": (MeshConfig(fsdp=1), {"default": "rope:theta=500"}, {}),
    "2 x 1": (MeshConfig(fsdp=1, context=2), {"default": "rope:theta=500"}, {}),
    "1 x 2, learned bias": (MeshConfig(fsdp=1, context=2, ulysses=2), {"default": "t5"}, {}),
    "2 x 2, several pieces": (MeshConfig(fsdp=1, context=4, ulysses=2), {"local": "rope:theta=100", "global": SELF_EXTEND}, {}),
    "8 x 1, sinks": (MeshConfig(fsdp=1, context=8), {"default": "rope:theta=500"}, {"sinks": True}),
    "4 x 2, slopes": (MeshConfig(fsdp=1, context=8, ulysses=2), {"default": "alibi"}, {}, ExecutionConfig(attention="blockwise")),
    "beside fsdp and tensor": (MeshConfig(fsdp=2, tensor=2, context=2), {"local": SELF_EXTEND, "global": "nope"}, {"sinks": True}),
}


QUICK = ("2 x 2, several pieces",)


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK))
def test_tokens_and_logits_are_those_of_one_device(case):
    """Rows of 9 and 37 tokens in chunks of 8, rings of 13 to 16 slots overwritten twice."""
    mesh, positions, changes, *execution = CASES[case]
    params, buffers, arch, table = build(dataclasses.replace(CONFIG, **changes), positions, LENGTH, *execution)
    split, made = place(params, table, mesh)
    with jax.set_mesh(made):
        tokens = generate(split, buffers, arch, PROMPTS, NEW, chunk=CHUNK)
        rows = [np.concatenate([prompt, new]) for prompt, new in zip(PROMPTS, tokens, strict=True)]
        found = by_chunks(split, buffers, arch, rows, CHUNK, NEW)
    wanted = forward(params, buffers, arch, rows)
    assert furthest(found, wanted) <= 1e-5
    for one, new in zip(wanted, tokens, strict=True):
        np.testing.assert_array_equal(np.argmax(one[-NEW - 1 : -1], axis=-1), new)


@pytest.mark.slow
def test_each_device_holds_its_share_of_the_slots():
    """Token s is in slot s // n of device s % n, and in a ring of R slots in slot s // n mod R."""
    params, buffers, arch, table = build(CONFIG, {"default": "rope:theta=500"}, LENGTH)
    params, made = place(params, table, MeshConfig(fsdp=1, context=4))
    order = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    index = Index(order, order, jnp.ones_like(order))
    with jax.set_mesh(made):
        cache = empty_cache(arch, buffers, 1, LENGTH, 8)
        start = 0
        for size in (8, 8, 1, 8, 3, 8, 1, 1):
            _, cache = extend(params, buffers, arch, cache, order[:, start : start + size], index.slice(start, size), start)
            start += size
    for kind, slots in (("global", 48), ("local", 16)):
        assert cache.keys[kind].shape[2] == slots
        assert {shard.data.shape[2] for shard in cache.keys[kind].addressable_shards} == {slots // 4}
        for shard in cache.index[kind].order.addressable_shards:
            held = np.zeros(slots // 4, np.int32)
            device = shard.index[1].start // (slots // 4)
            for number in range(start):
                if number % 4 == device:
                    held[number // 4 % (slots // 4)] = number
            np.testing.assert_array_equal(shard.data[0], held)


@pytest.mark.parametrize("start", [0, 3, 10])
def test_dealt_tokens_come_back(start):
    x = jnp.arange(2 * 16 * 3).reshape(2, 16, 3)
    with jax.set_mesh(place({}, {}, MeshConfig(fsdp=1, context=8))[1]):
        dealt = deal(x, start)
        assert all((start + int(dealt[0, 2 * device + i, 0]) // 3) % 8 == device for device in range(8) for i in range(2))
        np.testing.assert_array_equal(collect(dealt, start), x)


@pytest.mark.slow
def test_a_prefix_is_seen_beyond_the_window():
    """Keys that are marked keep their slots: the cache of such a model has no ring."""
    config = dataclasses.replace(CONFIG, prefix_attention=True)
    params, buffers, arch, table = build(config, {"default": "rope:theta=500"}, LENGTH)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 25))
    marked = (jnp.arange(24, dtype=jnp.int32) < 5).astype(jnp.int32)[None]
    batch = Batch.from_tokens(tokens).replace(is_prefix=marked)
    wanted = np.asarray(hidden_states(params, buffers, arch, batch)[0])
    split, made = place(params, table, MeshConfig(fsdp=1, context=4))
    with jax.set_mesh(made):
        cache = empty_cache(arch, buffers, 1, 24, 8)
        assert {keys.shape[2] for keys in cache.keys.values()} == {24}
        found = []
        for start in (0, 8, 16):
            here = batch.index.slice(start, 8)
            states, cache = extend(split, buffers, arch, cache, batch.tokens[:, start : start + 8], here, start)
            found.append(np.asarray(states))
    assert furthest([np.concatenate(found, axis=1)], [wanted]) <= 1e-5


def test_chunks_that_cannot_be_dealt_name_those_that_can():
    params, buffers, arch, table = build(CONFIG, {"default": "nope"}, LENGTH)
    params, made = place(params, table, MeshConfig(fsdp=1, context=8))
    message = "a chunk of 20 tokens must be divisible by the 8 devices of the context; try 16 or 24"
    with jax.set_mesh(made), pytest.raises(UserError, match=message):
        generate(params, buffers, arch, PROMPTS, NEW, chunk=20)


def test_a_ring_that_is_too_small_for_a_chunk_is_refused():
    params, buffers, arch, _ = build(CONFIG, {"default": "nope"}, LENGTH)
    cache = empty_cache(arch, buffers, 1, 40, 4)
    order = jnp.arange(8, dtype=jnp.int32)[None]
    message = "a chunk of 8 tokens needs 13 slots in 'local' layers, whose window of 6 has 9 in this cache; create it with chunk=8"
    with pytest.raises(UserError, match=message):
        extend(params, buffers, arch, cache, order, Index(order, order, order + 1), 0)


def test_a_cache_of_another_context_is_refused():
    params, buffers, arch, table = build(CONFIG, {"default": "nope"}, LENGTH)
    with jax.set_mesh(place(params, table, MeshConfig(fsdp=1, context=8))[1]):
        cache = empty_cache(arch, buffers, 1, 40)
    order = jnp.arange(8, dtype=jnp.int32)[None]
    with pytest.raises(UserError, match="for a context of 8 devices, and the mesh has 1; prefill again"):
        extend(params, buffers, arch, cache, order, Index(order, order, order + 1), 0)


LONG, TINY = 1 << 16, dataclasses.replace(CONFIG, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=32, window=256)


def elements(text: str) -> int:
    """Of the largest array in a compiled program."""
    shapes = re.findall(r"\b(?:pred|[subf]+\d+)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_prefill_of_65536_tokens_holds_no_array_of_queries_by_keys():
    """Not of a chunk's T queries by all S keys, nor by the S / 8 of a device; and what there is fits beside the cache."""
    chunk = 2048
    params, buffers, arch, table = build(TINY, {"default": "rope:theta=500"}, LONG)
    params, made = place(params, table, MeshConfig(fsdp=1, context=8))
    with jax.set_mesh(made):
        params = jax.jit(unstack)(params)
        cache = empty_cache(arch, buffers, 1, LONG, chunk, stacked=False)
        order = jnp.arange(chunk, dtype=jnp.int32)[None]
        step = _extend.lower(params, buffers, arch, cache, order, Index(order, order, order + 1), jnp.int32(0), 0)
    compiled = step.compile()
    memory = compiled.memory_analysis()
    assert elements(compiled.as_text()) < chunk * LONG // 8 // 8
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= share, "the cache is not written in place"
    assert memory.temp_size_in_bytes < chunk * LONG // 8, "not even a byte for each pair of a device"


@pytest.mark.slow
def test_prefill_of_65536_tokens_ends_in_the_logits_of_training():
    params, buffers, arch, table = build(TINY, {"default": "rope:theta=5e6"}, LONG)
    row = np.random.default_rng(0).integers(0, 256, LONG + 1)
    states = jax.jit(hidden_states, static_argnames="arch")(params, buffers, arch, Batch.from_tokens(row[None]))[0]
    wanted = np.asarray(logits(params, states[:, -16:], arch.config))
    split, made = place(params, table, MeshConfig(fsdp=1, context=8))
    index, chunk = Index.dense(1, LONG), 4096
    with jax.set_mesh(made):
        cache = empty_cache(arch, buffers, 1, LONG, chunk)
        for start in range(0, LONG, chunk):
            part = jnp.asarray(row[None, start : start + chunk], jnp.int32)
            states, cache = extend(split, buffers, arch, cache, part, index.slice(start, chunk), start)
        found = np.asarray(logits(split, states[:, -16:], arch.config))
    assert furthest([found], [wanted]) <= 1e-5
