"""The roofline against steps whose times others have published."""

import dataclasses

import pytest

from lcx.core.chips import TPU, WIDE
from lcx.core.mesh import MeshConfig
from lcx.planning.published import ROWS, fitted
from lcx.planning.roofline import StepTime, step_time
from lcx.planning.topology import topology
from lcx.planning.work import work_of
from tests.planning.cases import run

TESTS = [row for row in ROWS if not row.sets]


def test_enough_rows_are_kept_for_testing():
    assert len(TESTS) >= 6 and {"70B 128K", "7B ring 32K", "7B Ulysses 32K"} <= {row.name for row in TESTS}


@pytest.mark.parametrize("row", TESTS, ids=lambda row: row.name)
def test_published_steps_are_predicted_within_15_percent(row):
    assert row.predicted() == pytest.approx(row.seconds, rel=0.15)


def test_efficiencies_are_those_that_the_other_rows_set():
    for known, chip in ((TPU, "v5p"), (WIDE, "tpu7x")):
        found = fitted(known, [row for row in ROWS if row.where.name == chip])
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(known), rel=0.01)


def times(where="v5p:2x2x2", seq_len=1 << 20, batch_size=1, slices=1, **options) -> StepTime:
    place = topology(where, slices)
    config = run(seq_len, batch_size=batch_size, **options)
    mesh = MeshConfig(**{"fsdp": 1, "context": -1, **options.get("mesh", {})}).sizes(place.devices)
    return step_time(work_of(config.model, config.execution, batch_size, seq_len, 1, mesh), place)


def test_twice_the_length_takes_up_to_four_times_as_long():
    short, long = times(seq_len=1 << 18).seconds, times(seq_len=1 << 19).seconds
    assert 2 * short < long < 4 * short


def test_a_ring_of_few_tokens_waits_and_one_of_many_does_not():
    waiting = times("v5p:4x4x4", 1 << 16, execution={"context_strategy": "ring"}, name="llama2_7b")
    hidden = times("v5p:4x4x4", 1 << 22, execution={"context_strategy": "ring"}, name="llama2_7b")
    assert waiting.by_part["transfers"] > 0.5 * waiting.seconds
    assert hidden.by_part["transfers"] < 0.05 * hidden.seconds
    assert hidden.bound == "attention" and 0.2 < hidden.mfu < 0.7


def test_offloading_sends_to_the_host_what_attention_keeps():
    kept, sent = (times(seq_len=1 << 16, execution={"remat": policy}).segments[0] for policy in ("attention", "offload"))
    assert sent.compute == kept.compute and sent.transfer > 2 * kept.transfer


def test_slices_share_gradients_slowly():
    one = times("v5p:4x4x4", 1 << 18, 2, mesh={"data": 2, "context": 32})
    two = times("v5p:2x4x4", 1 << 18, 2, slices=2, mesh={"data": 2, "context": 32})
    assert two.segments[-1].transfer > one.segments[-1].transfer


def test_a_row_in_chunks_takes_a_pass_more_and_waits_for_a_slow_host():
    plain = {"mesh": {"context": 1}, "execution": {"remat": "attention"}}
    walked = {**plain, "execution": {"remat": "attention", "recurrent_chunk": 16384}}
    for where in ("h100:1", "v5p:1x1x1"):
        whole, parted = times(where, **plain), times(where, **walked)
        assert 4.3 / 3.5 * whole.by_part["attention"] < parted.by_part["attention"] < 4.6 / 3.5 * whole.by_part["attention"]
    # Smaller chunks bring the same keys more often.
    again = times("v5p:1x1x1", mesh={"context": 1}, execution={"remat": "attention", "recurrent_chunk": 1024})
    assert again.by_part["transfers"] > parted.by_part["transfers"]
