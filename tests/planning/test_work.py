"""The arithmetic of a step's work is that of the model's own counter."""

import pytest

from lcx.core.mesh import MeshConfig
from lcx.model.flops import step_flops
from lcx.planning.work import executed, useful, work_of
from tests.planning.cases import run


def sizes(devices, **mesh):
    return MeshConfig(**{"fsdp": 1, **mesh}).sizes(devices)


@pytest.mark.parametrize("name", ["llama31_8b", "mistral_7b", "gemma2_9b", "smollm3_3b"])
@pytest.mark.parametrize("mesh", [{"context": 8, "ulysses": 2}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
def test_useful_operations_are_those_that_mfu_counts(name, mesh):
    config = run(65536, batch_size=4, name=name)
    work = work_of(config.model, config.execution, 4, 65536, 2, sizes(8, **mesh))
    assert 8 * useful(work) == pytest.approx(step_flops(config.model, 4, 65536), rel=1e-12)


def test_policies_recompute_what_they_say():
    config = run(65536)
    found = {}
    for policy in ("none", "attention", "block", "dots"):
        changed = run(65536, execution={"remat": policy})
        found[policy] = executed(work_of(changed.model, changed.execution, 1, 65536, 1, sizes(8, context=8)))
    one = work_of(config.model, config.execution, 1, 65536, 1, sizes(8, context=8))
    down = 2 * 8192 * 4096 * 14336
    assert found["block"]["matmul"] - found["none"]["matmul"] == pytest.approx(32 * (one.dense - down))
    assert found["attention"]["attention"] == found["none"]["attention"]
    assert found["dots"]["attention"] == found["block"]["attention"] == pytest.approx(4.5 / 3.5 * found["none"]["attention"])


def test_heads_that_devices_trade_are_counted_once_each():
    config = run(65536)
    alone = work_of(config.model, config.execution, 1, 65536, 1, sizes(8, context=8))
    traded = work_of(config.model, config.execution, 1, 65536, 1, sizes(8, context=8, ulysses=8))
    assert alone.exchanged == 0
    # 8,192 tokens: 32 heads there in bfloat16 and back in float32, 8 heads of keys and of values in bfloat16.
    assert traded.exchanged == 8192 * 128 * (32 * 6 + 16 * 2)
    # A piece of the ring is the whole row then, with one of the 8 heads.
    assert traded.keys == alone.keys == 2 * 8192 * 8 * 128 * 2


def test_operations_are_those_of_the_program_that_a_compiler_was_given():
    """Outside of kernels, as counted in the jaxpr of the step for 8 v5p chips."""
    config = run(131072)
    found = executed(work_of(config.model, config.execution, 1, 131072, 1, sizes(8, context=8)))
    assert 8 * found["matmul"] == pytest.approx(7_376_623_510_749_184, rel=1e-3)


def test_rows_in_chunks_are_computed_forward_once_more():
    walked = run(65536, execution={"recurrent_chunk": 8192})
    one, parted = (work_of(c.model, c.execution, 1, 65536, 1, sizes(1)) for c in (run(65536), walked))
    assert (one.chunk, one.at_once, one.fetched("global")) == (None, 65536, 0)
    assert (parted.chunk, parted.at_once) == (8192, 8192)
    # Chunk i reads the keys and values of chunks 1 to i, of 8 heads of 128.
    assert parted.fetched("global") == 8 * 9 / 2 * 8192 * 2 * 8 * 128
    whole, twice = executed(one), executed(parted)
    assert twice["matmul"] == whole["matmul"] + 32 * one.dense
    assert twice["attention"] == pytest.approx(whole["attention"] * 5.5 / 4.5)


def test_behind_a_window_only_near_chunks_are_read():
    config = run(65536, name="mistral_7b", execution={"recurrent_chunk": 2048}, model={"pattern": ("local",), "window": 4096})
    found = work_of(config.model, config.execution, 1, 65536, 1, sizes(1))
    # A chunk's own, and the two that hold the 4,095 keys before it; less at the start of the row.
    assert found.fetched("local") == (1 + 2 + 3 * 30) * 2048 * 2 * 8 * 128
