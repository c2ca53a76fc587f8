"""Split-KV attention: queries over slots that are dealt at random to the devices equal dense attention on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcx.attention.attend import attend
from lcx.attention.parallel.split_kv import merge_over
from lcx.attention.spec import AttentionSpec
from lcx.core.mesh import SEQUENCE, MeshConfig, make_mesh
from lcx.positions.rotary import tables
from tests.attention.cases import HEADS, B, H, N, index
from tests.attention.context_cases import MASKS, SCHEMES
from tests.quick import mostly_slow

S = 48

CASES = [
    # size, ulysses, queries, scheme, mask, kernel, KV heads, segments
    (2, 1, 16, "rope", "causal", "blockwise", 2, "packed"),
    (2, 2, 1, "self_extend", "causal", "dense", 4, "none"),
    (4, 2, 8, "alibi", "window", "blockwise", 1, "packed"),
    (4, 1, 3, "t5", "causal", "blockwise", 4, "padding"),
    (8, 1, 16, "self_extend", "window", "blockwise", 2, "shared"),
    (8, 2, 1, "rope", "window", "dense", 1, "none"),
    (8, 4, 8, "t5", "prefix", "dense", 2, "padding"),
    (8, 1, 16, "alibi", "window", "flash", 2, "packed"),
    (8, 8, 1, "nope", "causal", "blockwise", 2, "shared"),
    (2, 1, 1, "self_extend", "window", "flat", 2, "packed"),
    (8, 2, 1, "t5", "causal", "flat", 1, "padding"),
]
QUICK = (CASES[4], CASES[6], CASES[10])
"""Every kernel but flash and every mask; a single query and several; one KV head and two."""


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK), ids=lambda case: "-".join(map(str, case)))
def test_split_slots_equal_dense(case):
    size, ulysses, count, scheme, mask, kernel, kv_heads, segments = case
    where = index(segments, "reset", S)
    asking = where.slice(S - count, count)
    q, k, v = (jax.random.normal(key, (B, S, N, H)) for key in jax.random.split(jax.random.key(size), 3))
    q, k, v = q[:, -count:], k[:, :, :kv_heads], v[:, :, :kv_heads]
    static, constants = SCHEMES[scheme].spec(S), SCHEMES[scheme].buffers(HEADS, S)
    learned = {"table": jax.random.normal(jax.random.key(7), (8, N))} if scheme == "t5" else {}
    extra = {
        "bias_params": {**constants.get("bias", {}), **learned},
        "sinks": jnp.linspace(-1.0, 2.0, N),
        "query_scale": jnp.linspace(0.5, 2.0, B * count).reshape(B, count),
    }

    def run(kernel, q, k, v, asking, where):
        options = {"kernel": kernel, "interpret": "tpu" if kernel == "flash" else None, "block_q": 16, "block_k": 8}
        spec = AttentionSpec(MASKS[mask], static, scale=0.5, softcap=5.0, **options)
        turns = {"q_tables": tables(static, constants, asking.positions), "k_tables": tables(static, constants, where.positions)}
        return attend(spec, q, k, v, asking, where, cached=True, **turns, **extra)

    wanted = run("dense", q, k, v, asking, where)
    dealt = np.random.default_rng(0).permutation(S)
    slots = jax.tree.map(lambda x: x[:, dealt], (k, v, where))
    # A flash kernel takes the whole mesh over, rows and heads included.
    config = MeshConfig(fsdp=2, tensor=2, context=2) if kernel == "flash" else MeshConfig(fsdp=1, context=size, ulysses=ulysses)
    with jax.set_mesh(make_mesh(config, jax.devices()[:size])):
        split = jax.jit(functools.partial(run, kernel), compiler_options={"xla_backend_optimization_level": 0})
        found = split(q, *slots[:2], asking, slots[2])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scatter", [False, True])
def test_merging_guards_rows_that_are_empty_somewhere_or_everywhere(scatter):
    """Two devices, four queries: seen by both, by one, by the other, by none."""
    o = jnp.arange(1.0, 9.0).reshape(2, 4, 1, 1)
    lse = jnp.asarray([[0.0, 3.0, -jnp.inf, -jnp.inf], [0.0, -jnp.inf, 200.0, -jnp.inf]])[..., None]
    o = jnp.where(jnp.isneginf(lse)[..., None], 0.0, o)
    mesh = make_mesh(MeshConfig(fsdp=1, context=2), jax.devices()[:2])
    out = PartitionSpec(None, SEQUENCE) if scatter else PartitionSpec()
    run = jax.shard_map(
        lambda o, lse: merge_over(SEQUENCE, (o, lse), scatter),
        mesh=mesh,
        in_specs=PartitionSpec(SEQUENCE),
        out_specs=out,
        check_vma=False,
    )
    merged, total = run(o, lse)
    np.testing.assert_allclose(merged[0, :, 0, 0], [3.0, 2.0, 7.0, 0.0])
    np.testing.assert_allclose(total[0, :, 0], [np.log(2.0), 3.0, 200.0, -np.inf], rtol=1e-6)
