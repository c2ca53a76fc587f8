"""Plans and what is changed in them; a compiler that gives up, dies or is missing."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from lcx.core.errors import UserError
from lcx.planning import compile as compiling
from lcx.planning import plan as planning
from lcx.planning.topology import topology
from tests.planning.cases import TINY, run

V5P = topology("v5p:2x2x2")


def test_a_plan_says_whether_it_fits_and_what_it_costs():
    plan = planning.stage_plan(run(), 0, V5P)
    assert plan.fits and plan.hours == pytest.approx(plan.time.seconds * 10 / 3600) and plan.chip_hours == 8 * plan.hours
    said = planning.sentence(plan)
    assert said.startswith("stages.long: a step of 1,048,576 tokens a row needs 62.2") and said.endswith("by arithmetic: it fits")
    assert planning.sentence(planning.stage_plan(run(1 << 21), 0, V5P)).endswith("by arithmetic: it does not fit")
    values = json.loads(json.dumps(planning.as_json(plan)))
    assert values["fits"] and values["mesh"]["ring"] == 8 and values["bytes"]["needed"] == plan.needed
    assert sum(values["bytes"]["by_arithmetic"].values()) == pytest.approx(plan.needed)


def test_the_host_has_to_have_room_too():
    plan = planning.stage_plan(run(1 << 21, execution={"remat": "offload"}), 0, V5P)
    assert plan.needed < plan.room and plan.host > V5P.host and not plan.fits


def test_changes_reach_the_run_its_stages_and_their_meshes():
    own = run(1 << 16, batch_size=4, mesh={"context": 8}, **{"positions": {}})
    staged = planning.changed(own, {"stages.long.mesh": {"fsdp": 1, "context": -1}})
    found = planning.changed(staged, {"execution.remat": "offload", "mesh.ulysses": 4, "stages.long.accumulate": 2})
    assert (found.execution.remat, found.stages[0].accumulate) == ("offload", 2)
    assert found.mesh.ulysses == found.stages[0].mesh.ulysses == 4
    assert own.mesh.ulysses == 1


WRONG = {
    "execution.remta": "--what_if=execution.remta: execution has no field 'remta'; did you mean 'remat'",
    "stages.lang.accumulate": "--stage='lang' is unknown; did you mean 'long'",
    "seed.more": "seed holds 0 and no fields",
}


@pytest.mark.parametrize(("key", "said"), WRONG.items())
def test_a_change_of_nothing_is_refused(key, said):
    with pytest.raises(UserError, match=said):
        planning.changed(run(), {key: 1})


def test_what_does_not_divide_is_said():
    with pytest.raises(UserError, match=r"stages.long.seq_len=1000001 must be divisible by 8"):
        planning.stage_plan(run(1_000_001), 0, V5P)
    with pytest.raises(UserError, match="mesh axes .* need a multiple of 3 devices and 8 are available"):
        planning.stage_plan(run(mesh={"fsdp": 3}), 0, V5P)


def test_slices_share_rows_and_a_row_only_if_asked():
    two = topology("v5p:2x2x2", 2)
    rows = planning.stage_plan(run(1 << 20, batch_size=2, mesh={"fsdp": 2}), 0, two)
    assert rows.mesh["fsdp"] == 2
    with pytest.raises(UserError, match="2 TPU slices cannot share mesh.data=1 x mesh.fsdp=1.*mesh.context_over_slices=True"):
        planning.stage_plan(run(), 0, two)
    # Keys then go over the network between slices, 90 / 6.25 times as slowly as over a link.
    one = planning.stage_plan(run(1 << 20), 0, topology("v5p:4x2x2")).time
    over = planning.stage_plan(run(1 << 20, mesh={"context_over_slices": True}), 0, two).time
    assert over.by_part["transfers"] > one.by_part["transfers"]


def stand_in(monkeypatch, code):
    monkeypatch.setattr(compiling, "COMMAND", (sys.executable, "-S", "-c", code))
    monkeypatch.setattr(compiling, "_libtpu", lambda: "libtpu.so")


def test_a_compiler_that_fails_a_check_is_caught(monkeypatch):
    stand_in(monkeypatch, "import os; os.write(2, b'F0101 x.cc:1] Check failed: a <= b (3 vs. 2)\\n'); os.abort()")
    with pytest.raises(UserError, match=r"on v5p:2x2x2: the compiler gave up \(Check failed: a <= b \(3 vs. 2\)\), as it does"):
        planning.compiled_plan(run(), 0, V5P)


def test_a_compiler_that_is_killed_is_caught(monkeypatch):
    stand_in(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="was killed, most likely for want of memory"):
        planning.compiled_plan(run(), 0, V5P)


def test_a_compiler_without_room_says_how_much_it_asked_for(monkeypatch):
    reply = {
        "exhausted": "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 134.44G of 95.74G hbm.",
        "state": {}, "operations": {"kernels": 1.0, "others": 2.0}, "compile_seconds": 3.0,
    }  # fmt: skip
    stand_in(monkeypatch, f"print({json.dumps(json.dumps(reply))})")
    plan = planning.compiled_plan(run(), 0, V5P)
    assert not plan.fits and plan.needed == 134.44 * 2**30 and plan.ratio == plan.needed / plan.held.total


WRITES = """
import json, pathlib, sys, time
dump = pathlib.Path(json.load(sys.stdin)["dump"])
dump.mkdir()
said = {"program": "jit_step", "mesh": {"ring": 8}, "state": {}, "operations": {"kernels": 1.0, "others": 2.0}}
print(json.dumps(said), flush=True)
for ending, text in (
    (".txt", "ENTRY %main (a: bf16[4]) -> bf16[4] {\\n  %s = f32[8]{0} all-reduce(%a), replica_groups={{0,1,2,3,4,5,6,7}}\\n}"),
    ("-buffer-assignment.txt", "allocation 0: size 30, parameter 0:\\nallocation 1: size 12, preallocated-temp:\\n"),
    ("-memory-usage-report.txt", ""),
):
    (dump / f"module_0000.jit_step.cl_1.after_optimizations{ending}").write_text(text)
"""
"""A compiler that has written down what is wanted."""


def folders():
    return set(Path(tempfile.gettempdir()).glob("lcx-plan-*"))


def test_a_compiler_is_ended_once_it_has_written_what_is_wanted(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stand_in(monkeypatch, WRITES + "time.sleep(600)")
    plan = planning.compiled_plan(run(), 0, V5P)
    assert plan.fits and plan.needed == 42 and plan.compiled.memory["arguments"] == 30 and plan.compiled.others == 2
    assert [(one.kind, one.axes, one.size) for one in plan.compiled.collectives] == [("all-reduce", ("ring",), 32)]
    assert plan.compiled.seconds < 60 and not folders()


def test_a_compiler_that_dies_half_way_leaves_a_sentence_and_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    half = WRITES.replace('    ("-memory-usage-report.txt", ""),\n', "")
    stand_in(monkeypatch, half + "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="was killed, most likely for want of memory"):
        planning.compiled_plan(run(), 0, V5P)
    stand_in(monkeypatch, half + "raise ValueError('no code for this')")
    with pytest.raises(UserError, match="on v5p:2x2x2: the compiler gave up: ValueError: no code for this; plan by arithmetic"):
        planning.compiled_plan(run(), 0, V5P)
    assert not folders()


def test_a_compiler_that_cannot_even_hold_temporaries_says_how_many():
    said = "Ran out of memory on HBM, the total memory required for HLO temporaries (323.75G) exceeds available HBM (95.74G)."
    assert compiling.used(said) == 323.75 * 2**30 and compiling.used("nothing") == float("inf")


def test_a_missing_libtpu_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compiling.sys, "prefix", str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match="needs libtpu, which is not installed; install it with pip install libtpu"):
        planning.compiled_plan(run(), 0, V5P)


def test_gpus_have_no_compiler_here():
    with pytest.raises(UserError, match="--topology=h100:8: no compiler for h100 works without one; plan by arithmetic"):
        planning.compiled_plan(run(1 << 16), 0, topology("h100:8"))


@pytest.mark.slow
def test_a_step_compiles_for_host_devices():
    config = run(512, model={**TINY, "vocab_size": 1024}, execution={"compute_dtype": "float32"})
    plan = planning.compiled_plan(config, 0, topology("cpu:4"))
    assert plan.fits and plan.compiled.state["parameters"] == pytest.approx(plan.held.parts["parameters"])
    assert {one.axes for one in plan.compiled.collectives} == {("ring",)} and plan.compiled.others > 0


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LCX_NO_LIBTPU") == "1", reason="no libtpu")
def test_a_slice_that_there_is_not_is_one_sentence():
    with pytest.raises(UserError, match=r"--topology=v5p:3x5x7 is no slice that libtpu knows"):
        planning.compiled_plan(run(105 * 2 * 4096, model={"model_dim": 3360}), 0, topology("v5p:3x5x7"))
