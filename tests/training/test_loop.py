"""Whole runs: whatever interrupts one, the rest is bitwise what it would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.training.builder import StageBuilder
from lcx.training.checks import warn_repeats
from lcx.training.loading import load_params
from lcx.training.loop import train
from lcx.training.metrics import TIMING, read
from lcx.training.profile import ProfileSteps
from lcx.training.stages import run_config
from lcx.training.step import TrainStep
from lcx.training.workdir import exclusive, fingerprint, open_workdir, read_config

ROOT = Path(__file__).parents[2]


def go(workdir, **changes):
    return train(run_config(tiny.config(**changes)), workdir, jax.devices()[:1])


def rows(workdir):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, go(workdir)


def same(workdir, result, whole):
    assert rows(workdir) == rows(whole[0])
    jax.tree.map(np.testing.assert_array_equal, result.params, whole[1].params)


def test_a_whole_run(whole):
    workdir, result = whole
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, 19))
    assert [row["stage"] for row in found] == ["base"] * 8 + ["longer"] * 10
    assert found[-1]["loss"] < found[0]["loss"]
    assert result.schemes["default"].theta == 400.0
    assert {"tokens_per_second", "mfu", "data_wait", "host_memory"} <= set(read(workdir / "metrics.jsonl")[0])


def test_a_trace_of_chosen_steps(whole, tmp_path, capsys):
    run = run_config(tiny.config())
    result = train(run, tmp_path, jax.devices()[:1], profile=ProfileSteps(7, 10))
    same(tmp_path, result, whole)
    (trace,) = tmp_path.glob("profile/**/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    steps = [
        dict(event.stats)["step_num"] for plane in planes for line in plane.lines for event in line.events if event.name == "train"
    ]
    assert sorted(steps) == [7, 8, 9, 10]
    assert "profile: steps 7 to 10 are in" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--profile=7:10 names steps that are done, for the run is at step 18"):
        train(run, tmp_path, jax.devices()[:1], profile=ProfileSteps(7, 10))


def test_a_workdir_in_use_is_refused(whole, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    with exclusive(workdir), pytest.raises(UserError, match=rf"is in use by process {os.getpid()}; wait for it"):
        go(workdir)
    same(workdir, go(workdir), whole)


def test_a_finished_run_has_nothing_to_do(whole, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    same(workdir, go(workdir), whole)


@pytest.mark.parametrize("at", [6, pytest.param(14, marks=pytest.mark.slow)])
def test_kill_9_and_rerun(at, whole, tmp_path):
    child = subprocess.run([sys.executable, str(ROOT / "tests/training/tiny.py"), tmp_path, str(at)], cwd=ROOT, env=child_env())
    assert child.returncode == -signal.SIGKILL
    assert at <= len(rows(tmp_path)) < 18
    same(tmp_path, go(tmp_path), whole)


def child_env():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_first(number, error, whole, tmp_path):
    tiny.when_rows(tmp_path, 10, number)
    with pytest.raises(error) as caught:
        go(tmp_path, checkpoint={"every": None})
    if error is SystemExit:
        assert caught.value.code == 143
    stopped = len(rows(tmp_path))
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert 10 <= stopped < 18 and max(saved) == stopped
    same(tmp_path, go(tmp_path), whole)


@pytest.mark.parametrize("at", [0, 8])
def test_a_signal_is_heard_while_a_stage_compiles(at, whole, tmp_path, monkeypatch, capsys):
    compiled = jax.stages.Lowered.compile

    def slow(self, *args, **options):
        if threading.current_thread() is not threading.main_thread() and len(rows(tmp_path)) == at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return compiled(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jax.stages.Lowered, "compile", slow)
        patch.setattr(TrainStep, "is_compiled_for", lambda self, batch: False)
        begin = time.monotonic()
        go(tmp_path, checkpoint={"every": None})
    said = capsys.readouterr()
    assert time.monotonic() - begin < 60 and "SIGINT: stopping" in said.err
    assert ("no step is done yet" if at == 0 else f"saved at step {at}; rerun") in said.out
    assert len(rows(tmp_path)) == at
    same(tmp_path, go(tmp_path), whole)


def test_a_truncated_checkpoint_falls_back(whole, tmp_path, capfd):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    for path in (workdir / "checkpoints/18").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = go(workdir)
    assert "checkpoint 18" in capfd.readouterr().err.replace("\n", " ")
    assert (workdir / "checkpoints.unreadable/18").is_dir()
    same(workdir, result, whole)


def test_nothing_readable_is_an_error_and_nothing_is_lost(whole, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    for path in (workdir / "checkpoints").rglob("d/*"):
        path.write_bytes(b"")
    before = rows(workdir)
    with pytest.raises(UserError, match="can be read"):
        go(workdir)
    assert rows(workdir) == before
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["16", "18", "8"]


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(tmp_path):
    """A run whose stages each go on from the last one's checkpoint on another mesh ends as on one device."""
    stages = [{"name": f"part{i}", "seq_len": 64, "steps": 4, "batch_size": 8, "keep_optimizer_state": True} for i in range(3)]
    go(tmp_path / "one", stages=stages)
    meshes = [{"fsdp": 1, "context": 8}, {"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 1, "tensor": 2, "context": 2, "ulysses": 1}]
    for i, mesh in enumerate(meshes):
        train(run_config(tiny.config(stages=stages[: i + 1], mesh=mesh)), tmp_path / "many", jax.devices())
    wanted, found = rows(tmp_path / "one"), rows(tmp_path / "many")
    assert [row["step"] for row in found] == [row["step"] for row in wanted] == list(range(1, 13))
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in wanted], rtol=1e-6)


def test_a_workdir_of_another_config(whole):
    with pytest.raises(UserError, match=r"another config: seed is 0 there but 1 here"):
        go(whole[0], seed=1)
    with pytest.raises(UserError, match=r"stages\.longer\.steps is 10 there but 11 here"):
        go(whole[0], stages=tiny.stages(steps=11))


def test_a_start_that_came_to_no_checkpoint_leaves_the_workdir_free(tmp_path):
    open_workdir(tmp_path, run_config(tiny.config(seed=1)))
    open_workdir(tmp_path, run_config(tiny.config(seed=2)))
    assert read_config(tmp_path).seed == 2


COULD_CHANGE_IN_0_1 = ("remat", "layer_unroll", "mlp_tile", "loss_tile", "attention", "context_strategy", "context_layout")


def as_lcx_0_1_wrote_it(run):
    """config.json with the fields of `ExecutionConfig` among the model's."""
    values = configs.plain(run)
    execution = values.pop("execution")
    # Fields that it did not have.
    del values["lora"], values["init_noise"]
    for name in ("head_groups", "remat_every", "recurrent_chunk"):
        del execution[name]
    for stage in values["stages"]:
        del stage["shifted_group"]
    return {**values, "model": {**values["model"], **execution}}


OTHER = {
    "remat": "dots", "attention": "dense", "mlp_tile": 32, "loss_tile": 4096, "context_strategy": "ring",
    "context_layout": "striped",
}  # fmt: skip
"""What may change between two starts."""


def check_refusals(workdir, **changes):
    for name, value, default in (("compute_dtype", "bfloat16", "float32"), ("expert_matmul", "dense", "auto")):
        with pytest.raises(UserError, match=rf"another config: execution\.{name} is '{default}' there but '{value}' here"):
            go(workdir, execution={name: value}, **changes)


def test_a_finished_workdir_of_lcx_0_1_is_read(whole, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    before = read_config(workdir)
    (workdir / "config.json").write_text(json.dumps(as_lcx_0_1_wrote_it(before)))
    assert read_config(workdir) == before
    check_refusals(workdir)
    same(workdir, go(workdir, execution=OTHER), whole)
    assert json.loads((workdir / "config.json").read_text())["execution"]["remat"] == "dots"


@pytest.mark.slow
def test_a_workdir_of_lcx_0_1_is_gone_on_with(tmp_path):
    """Its config is read, and what may change between two starts is what could change then."""
    stages = tiny.stages()
    go(tmp_path, stages=stages[:1], execution={"layer_unroll": 1})
    before = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(as_lcx_0_1_wrote_it(before)))
    assert read_config(tmp_path) == before and before.execution.layer_unroll == 1
    check_refusals(tmp_path, stages=stages[:1])
    go(tmp_path, stages=[stages[0], {**stages[1], "steps": 2}], execution=OTHER)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 11))
    assert json.loads((tmp_path / "config.json").read_text())["execution"]["remat"] == "dots"


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "bfloat16", "remat": "block"}], ids=str)
def test_a_fingerprint_is_that_of_lcx_0_1(changes):
    run = run_config(tiny.config(execution=changes))
    could_change = {"mesh", "checkpoint", "metrics", "max_bad_steps", *(f"model.{name}" for name in COULD_CHANGE_IN_0_1)}
    leaves = {
        path: value
        for path, value in configs.leaves(as_lcx_0_1_wrote_it(run))
        if "mesh" not in path.split(".") and not could_change & {path, path.split(".")[0]}
    }
    assert fingerprint(run) == configs.fingerprint(leaves)


def test_parameters_for_evaluation(whole):
    workdir, result = whole
    loaded = load_params(workdir)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.params)
    assert loaded.schemes["default"].theta == 400.0 and loaded.meta.length == 128
    base = load_params(workdir, stage="base")
    assert (base.meta.step, base.meta.length, base.schemes["default"].theta) == (8, 64, 100.0)
    assert load_params(workdir / "checkpoints" / "16").meta.stage_step == 8
    with pytest.raises(UserError, match="no stage 'bass'"):
        load_params(workdir, stage="bass")
    with pytest.raises(UserError, match="its steps are 8, 16, 18"):
        load_params(workdir, step=5)
    with pytest.raises(UserError, match="does not hold a run"):
        load_params(workdir / "checkpoints" / "16" / "params")


def test_given_weights(whole, tmp_path):
    stage = {**tiny.stages()[1], "steps": 10}
    result = go(tmp_path, init_from=f"{whole[0]}/checkpoints/8", stages=[stage])
    # Stage 0 here and stage 1 there see different batches; the start is the same weights.
    first = next(row for row in rows(whole[0]) if row["stage"] == "longer")["loss"]
    np.testing.assert_allclose(rows(tmp_path)[0]["loss"], first, rtol=0.1)
    assert result.step == 10


def test_going_on_from_another_run(whole, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(whole[0], source)
    for step in (16, 18):
        shutil.rmtree(source / "checkpoints" / str(step))
    result = go(tmp_path / "own", resume_from=str(source))
    jax.tree.map(np.testing.assert_array_equal, result.params, whole[1].params)
    assert rows(tmp_path / "own") == rows(whole[0])[8:]


def test_another_run_stays_as_it_is(whole, tmp_path, capfd):
    source = tmp_path / "source"
    shutil.copytree(whole[0], source)
    damage = next(path for path in (source / "checkpoints" / "18").rglob("*") if path.name == "manifest.ocdbt")
    damage.write_bytes(b"")
    (source / "checkpoints" / "19.orbax-checkpoint-tmp").mkdir()
    before = sorted(source.rglob("*"))
    with pytest.raises(UserError, match="of another model or optimizer: progress/opt_state.* is absent there but"):
        go(tmp_path / "own", resume_from=str(source), optim={"name": "adafactor"})
    go(tmp_path / "own", resume_from=str(source))
    assert "18 in" in (said := capfd.readouterr().err) and "is damaged" in said
    assert rows(tmp_path / "own") == rows(whole[0])[16:]
    assert sorted(source.rglob("*")) == before


def test_a_stage_that_trains_what_was_frozen_can_follow(whole, tmp_path):
    frozen = {**tiny.stages()[1], "steps": 2, "optim": {"freeze": ("embed",)}}
    free = {**frozen, "name": "free", "optim": {"freeze": ()}}
    start = {"init_from": str(whole[0]), "monitor": {"enabled": False}}
    one = go(tmp_path, stages=[frozen], **start)
    assert go(tmp_path, stages=[frozen, free], **start).step == 4
    # The first stage's checkpoint, from when the run kept no embeddings, is as readable as before.
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, step=2).params, one.params)
    assert (load_params(tmp_path).params["embed"]["embedding"] != one.params["embed"]["embedding"]).any()


MONITOR = {"enabled": True, "steps": 8, "skip": 0, "probe_rows": 4}
HARD = {"max_up_pairs": -1.0}
EASY = {"max_swing": 1e9, "max_up_pairs": 1.0, "max_text_excess": 9.0, "max_needle_excess": 9.0}


def attempts(workdir):
    found = [row for row in rows(workdir) if row["stage"] == "longer"]
    return [
        [{k: v for k, v in row.items() if k != "attempt"} for row in found if row["attempt"] == a]
        for a in range(1 + max(row["attempt"] for row in found))
    ]


def test_the_monitor_lets_a_good_stage_pass(whole, tmp_path):
    result = go(tmp_path, monitor={**MONITOR, **EASY})
    assert rows(tmp_path) == rows(whole[0])
    (decision,) = result.decisions
    assert decision["verdict"] == "straight down" and decision["theta"] == 400.0
    assert json.loads((tmp_path / "decisions.jsonl").read_text()) == decision


def test_the_monitor_rolls_back(whole, tmp_path, capsys):
    result = go(tmp_path, monitor={**MONITOR, **HARD}, stages=tiny.stages(thetas=[400.0, 400.0, 1e6]))
    assert [d["verdict"] for d in result.decisions] == ["oscillating"] * 3
    assert [d["theta"] for d in result.decisions] == [400.0, 400.0, 1e6]
    first, second, third, *rest = attempts(tmp_path)
    # The same theta again from the stage's start, weights, optimizer and data alike, gives the same bits.
    assert first == second and len(first) == 8
    assert third[0]["loss"] != first[0]["loss"]
    # With nothing left to try, the best theta runs to the end.
    chosen = result.decisions[-1]["next_theta"]
    assert chosen == min(result.decisions, key=lambda d: d["probe_after"]["needle_loss"])["theta"]
    last = rest[0] if rest else third
    assert last[-1]["stage_step"] == 10
    said = capsys.readouterr().out
    assert said.count("back to the start of longer") == 2 and "no theta is left" in said
    # What was decided is in force when the run is looked at again.
    assert load_params(tmp_path).schemes["default"].theta == chosen
    before = rows(tmp_path)
    again = go(tmp_path, monitor={**MONITOR, **HARD}, stages=tiny.stages(thetas=[400.0, 400.0, 1e6]))
    assert rows(tmp_path) == before and len(again.decisions) == 3
    # So it is in a run that goes on from this one.
    shutil.rmtree(tmp_path / "checkpoints" / "18")
    after = go(
        tmp_path / "own", resume_from=str(tmp_path), monitor={**MONITOR, **HARD}, stages=tiny.stages(thetas=[400.0, 400.0, 1e6])
    )
    assert rows(tmp_path / "own") == before[-2:] and after.decisions == again.decisions
    assert read(tmp_path / "own" / "decisions.jsonl") == read(tmp_path / "decisions.jsonl")
    with pytest.raises(UserError, match="which no monitor watched from its start; set stages.longer.monitor=False"):
        go(tmp_path / "late", resume_from=str(unwatched(whole, tmp_path)), monitor={**MONITOR, **HARD})


def unwatched(whole, folder):
    """A run without a monitor in the middle of its second stage."""
    shutil.copytree(whole[0], folder / "unwatched")
    shutil.rmtree(folder / "unwatched" / "checkpoints" / "18")
    return folder / "unwatched"


@pytest.mark.slow
def test_steps_that_are_not_finite_stop_the_run(tmp_path, capfd):
    stages = [{**tiny.stages()[0], "steps": 8, "parts": {"text": {"loss_weight": 1e38}, "needles": {"loss_weight": 1e38}}}]
    with pytest.raises(UserError, match=r"last of 3 non-finite steps in a row.*lower optim.lr"):
        go(tmp_path, stages=stages, max_bad_steps=3)
    assert [row["in_a_row"] for row in rows(tmp_path)] == [1, 2, 3]
    assert "parameters are left unchanged" in capfd.readouterr().err.replace("\n", " ")


CHANGING = tiny.stages(mixture={"text": ((0, 0.8), (1, 0.1)), "needles": ((0, 0.2), (0.5, 0.2), (1, 0.9))})


def test_weights_that_change_within_a_stage_resume_bitwise(tmp_path):
    """Stopped in the middle of the stage, and on another mesh, a run sees the rows that it would have seen."""
    result = go(tmp_path / "whole", stages=CHANGING)
    found = rows(tmp_path / "whole")
    # Rows have one weight in each part here, so the shares of rows can be read off the weights of tokens.
    text = [row["weight_by_part"].get("text", 0) for row in found[8:]]
    assert sum(text[:4]) > 2 * sum(text[-4:]) > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("18", "16"))
    again = go(tmp_path / "cut", stages=CHANGING)
    same(tmp_path / "cut", again, (tmp_path / "whole", result))
    one, two = (
        StageBuilder(run_config(tiny.config(stages=CHANGING, mesh={"data": n, "fsdp": 1})), [], jax.devices()[:n]).build(1)
        for n in (1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(built.batch(9)) for built in (one, two)))


def test_loss_of_each_part_is_in_every_row(whole):
    for row in rows(whole[0]):
        loss, weight = row["loss_by_part"], row["weight_by_part"]
        assert set(loss) == set(weight) == {"text", "needles"}
        assert sum(weight.values()) == pytest.approx(row["weight"])
        assert sum(loss[part] * weight[part] for part in loss) / row["weight"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.fixture
def few(tmp_path):
    """A corpus of few words, and the tiny run on it."""
    corpus = tmp_path / "few.txt"
    corpus.write_text("a few words to read again and again\n" * 40)
    values = tiny.config(data={"parts": {"text": {"source": {"kind": "text", "path": str(corpus)}}}})
    return corpus, {**values, "data": {**values["data"], "heldout_fraction": 0.0}}


@pytest.mark.slow
def test_too_many_repeats_are_said_once_a_stage(few, tmp_path, capsys):
    corpus, values = few
    train(run_config({**values, "stages": tiny.stages(steps=20)}), tmp_path / "run", jax.devices()[:1])
    check_warning(capsys, corpus)


def test_too_many_repeats_are_said(few, capsys):
    corpus, values = few
    run = run_config(values)
    builder = StageBuilder(run, [], jax.devices()[:1])
    # 1,440 tokens in rows of 64 and 128; 8 steps of 8 rows and 10 of 4.
    for stage, loader, times in zip(run.stages, builder.loaders, (64 / 23, 40 / 12), strict=True):
        ((found, names),) = loader.repeats(stage.steps).values()
        assert (found, names) == (pytest.approx(times), ["text"])
        warn_repeats(stage, loader)
    assert capsys.readouterr().err == ""
    longer = run_config({**values, "stages": tiny.stages(steps=20)})
    for stage, loader in zip(longer.stages, StageBuilder(longer, [], jax.devices()[:1]).loaders, strict=True):
        warn_repeats(stage, loader)
    check_warning(capsys, corpus)


def check_warning(capsys, corpus):
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "repeats" in line]
    assert f"stages.longer reads text:{corpus} (text) 6.7 times; beyond 4 repeats" in warning
    assert "lower its weight in stages.longer.mixture" in warning
