"""The arithmetic of memory: exact where the step's own shapes say it, and growing with what it is for."""

import math

import jax
import pytest

from lcx.core.mesh import MeshConfig, make_mesh
from lcx.planning.child import state_bytes
from lcx.planning.memory import PARTS, held, state_sizes
from lcx.planning.program import build
from lcx.planning.topology import topology
from tests.planning.cases import TINY, run

V5P = topology("v5p:2x2x2")


def parts(where=V5P, **options):
    config = run(**options)
    mesh = MeshConfig(**{"fsdp": 1, "context": -1, **options.get("mesh", {})}).sizes(where.devices)
    return held(config, config.stages[0], mesh, where)


@pytest.mark.parametrize("optim", [{}, {"name": "adafactor"}, {"name": "lion"}, {"freeze": ("embed",)}], ids=str)
@pytest.mark.parametrize("mesh", [{"context": 4, "fsdp": 2}, {"tensor": 2, "fsdp": 4, "context": 1}], ids=str)
def test_parameters_and_optimizer_are_those_of_the_step(optim, mesh, devices):
    config = run(512, batch_size=8, mesh=mesh, model=TINY, optim=optim)
    program = build(config, 0, devices)
    sizes = make_mesh(config.mesh, devices).shape
    found = state_sizes(config, config.stages[0], sizes)
    exact = state_bytes(program)
    assert found.parameters == exact["parameters"]
    assert found.optimizer == pytest.approx(exact["optimizer"], rel=1e-3)
    trained = program.step.abstract_state().params
    assert found.trained == sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(trained))


def test_all_parts_are_named_and_sum_up():
    found = parts()
    assert tuple(found.parts) == PARTS and found.total == sum(found.parts.values()) and found.host == 0
    assert found.parts["saved inputs"] == 32 * (1 << 17) * 4096 * 2


def test_policies_keep_less_and_less():
    kept = [parts(execution={"remat": policy}) for policy in ("none", "dots", "attention", "block", "offload")]
    assert [one.parts["saved inputs"] for one in kept] == sorted((one.parts["saved inputs"] for one in kept), reverse=True)
    assert [one.host > 0 for one in kept] == [False] * 4 + [True]


def test_longer_rows_need_more_and_more_chips_less():
    needed = [parts(seq_len=length).total for length in (1 << 17, 1 << 18, 1 << 19, 1 << 20)]
    assert needed == sorted(needed)
    assert parts(topology("v5p:4x4x4")).total < parts().total


def test_microbatches_need_less_at_once():
    whole, parted = parts(seq_len=1 << 17, batch_size=8), parts(seq_len=1 << 17, batch_size=8, accumulate=8)
    assert parted.parts["saved inputs"] == whole.parts["saved inputs"] / 8
    assert parted.parts["gradients"] > whole.parts["gradients"]


def test_nested_recomputation_keeps_what_attention_gives_in_the_type_of_computation():
    found = parts(execution={"remat": "nested"})
    tokens, period = 1 << 17, (1 << 17) * 4096 * 2
    # Of 8 groups of layers the input; of each of 4 layers the input, the output of attention and its log-sum-exp.
    assert found.parts["saved inputs"] == (8 + 4 + 4) * period + 4 * tokens * 32 * 4


def test_attention_holds_less_if_fewer_heads_attend_at_a_time():
    few, many = (parts(execution={"head_groups": count}).parts["attention"] for count in (8, 1))
    queries, keys = (1 << 17) * 4096, 2 * (1 << 17) * 1024
    assert many - few == (12 * queries + 16 * keys) * 7 / 8


def test_of_rows_in_chunks_only_keys_grow_and_they_are_on_the_host():
    walked = {"mesh": {"context": 1}, "execution": {"recurrent_chunk": 8192}}
    short, long = (parts(topology("h100:1"), seq_len=length, **walked) for length in (1 << 18, 1 << 20))
    assert short.parts == long.parts
    # Of 32 layers: 8 heads of 128 in bfloat16, and gradients in float32, of keys and of values.
    assert long.host == 4 * short.host == (1 << 20) * 32 * 8 * 128 * 2 * (2 + 4)
    at_home = parts(topology("cpu:1"), seq_len=1 << 20, **walked)
    assert at_home.host == 0 and at_home.parts["saved inputs"] == long.parts["saved inputs"] + long.host
