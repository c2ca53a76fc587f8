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
