"""Where the time of a run goes: rows that fill it, and their sums over restarts, rollbacks and pauses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from lcx.core.errors import UserError
from lcx.report import time as time_report
from lcx.training import goodput, metrics
from lcx.training.checkpoints import FOLDER
from lcx.training.goodput import FILE, Recorder, summary
from lcx.training.loop import train
from lcx.training.stages import run_config
from tests.training import tiny


def row(event, at, seconds=None, **values):
    return {"event": event, "time": float(at), **values, "seconds": seconds or {}}


def test_the_parts_are_the_whole_time(tmp_path):
    since = time.time() - 5
    with Recorder(since) as record:
        record.keep(tmp_path)
        with record.span(goodput.STEP):
            with record.span(goodput.DATA):
                time.sleep(0.02)
            time.sleep(0.03)
            record.step(1)
            with record.span(goodput.SAVE):
                time.sleep(0.02)
            record.step(2)
    found = summary(metrics.read(tmp_path / FILE))
    assert found.wall == pytest.approx(time.time() - since, abs=0.5)
    assert sum(found.parts.values()) == pytest.approx(found.wall, abs=1e-3)
    assert found.parts[goodput.INIT] == pytest.approx(5, abs=0.5)
    assert 0.02 <= found.parts[goodput.DATA] < 0.5 and 0.03 <= found.parts[goodput.STEP] < 0.5 and found.parts[goodput.SAVE] >= 0.02


def test_work_that_is_done_again_is_lost():
    rows = [
        row("job_start", 100),
        row("goes_on_from", 110, {"accelerator_init": 10}, step=0),
        *(row("step_end", 110 + n, {"step": 0.75, "data_loading": 0.25}, step=n) for n in range(1, 8)),
        # Killed after step 7; the checkpoint is of step 4.
        row("job_start", 137),
        row("goes_on_from", 140, {"accelerator_init": 1, "checkpoint_restore": 2}, step=4),
        *(row("step_end", 136 + n, {"step": 1.0}, step=n) for n in range(5, 9)),
        # The monitor goes back to step 6, and then a person stops for a day.
        row("goes_on_from", 144, step=6),
        row("step_end", 145, {"step": 1.0}, step=7),
        row("job_end", 145, how="interrupted"),
        row("job_start", 100_000),
        row("goes_on_from", 100_005, {"accelerator_init": 5}, step=7),
        row("step_end", 100_006, {"step": 1.0}, step=8),
        row("job_end", 100_006, how="finished"),
    ]
    found = summary(rows)
    assert found.parts == {
        "step": 4 * 0.75 + 2 + 1 + 1, "data_loading": 4 * 0.25, "accelerator_init": 16, "checkpoint_restore": 2,
        "wasted_progress": 3 + 2, "infrastructure_recovery": 20,
    }  # fmt: skip
    assert found.wall == 45 + 6 == sum(found.parts.values())
    assert (found.paused, found.processes, found.lost, found.rolled_back) == (100_000 - 145, 3, (3, 0), 2)
    assert found.share == 7 / 51
    assert summary([]) is None


def test_how_a_process_ends_is_kept(tmp_path):
    for i, (error, how) in enumerate(((KeyboardInterrupt, "interrupted"), (SystemExit, "lost"), (UserError, "error"))):
        with pytest.raises(error), Recorder() as record:
            record.keep(tmp_path)
            raise error
        last = metrics.read(tmp_path / FILE)[-1]
        assert (last["event"], last["how"], len(metrics.read(tmp_path / FILE))) == ("job_end", how, 2 * (i + 1))
    with pytest.raises(UserError), Recorder():
        raise UserError("refused before there is a workdir")


def test_only_one_process_writes_and_a_row_cut_short_is_dropped(tmp_path):
    with Recorder() as record:
        record.keep(tmp_path, active=False)
        record.step(1)
    assert not (tmp_path / FILE).exists()
    with Recorder() as record:
        record.keep(tmp_path)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "step_e')
    with Recorder() as record:
        record.keep(tmp_path)
    assert [json.loads(line)["event"] for line in (tmp_path / FILE).read_text().splitlines()] == ["job_start", "job_end"] * 2


def test_a_run_leaves_a_record_of_all_its_steps(tmp_path):
    # Settings that no other test has: its program is yet to be compiled.
    train(run_config(tiny.config(optim={"lr": 3e-3, "warmup_steps": 2, "b1": 0.91})), tmp_path, jax.devices()[:1])
    rows = metrics.read(tmp_path / FILE)
    found = summary(rows)
    assert [one["step"] for one in rows if one["event"] == "step_end"] == list(range(1, 19))
    assert found.wall == pytest.approx(rows[-1]["time"] - rows[0]["time"]) and found.lost == ()
    assert sum(found.parts.values()) == pytest.approx(found.wall, rel=1e-3)
    assert {goodput.STEP, goodput.DATA, goodput.COMPILE, goodput.SAVE, goodput.PREPARATION} <= found.parts.keys()
    page = time_report.section(found)
    assert "program startup" in page and "compiling" in page and "100.0%" in page
    assert time_report.bar(found).axes[0].patches and "Goodput is" in time_report.note(found)
    assert time_report.section(None) == time_report.note(None) == ""


@pytest.mark.slow
def test_a_run_records_a_step_that_this_process_was_late_for(tmp_path):
    def slowly(built, step, state, batch):
        if built.index == 1 and step == 13:
            time.sleep(1.6)
        return batch

    run = run_config(tiny.config(stages=[{**stage, "steps": 16} for stage in tiny.stages()[:2]], monitor={"enabled": False}))
    train(run, tmp_path, jax.devices()[:1], reweight=slowly)
    (one,) = summary(metrics.read(tmp_path / FILE)).slow
    assert one.step == 30 and one.late == pytest.approx(1.6, abs=0.5) and one.took > one.late > one.usual
    page = time_report.slow_steps(summary(metrics.read(tmp_path / FILE)))
    assert "who was ready last" in page and "process 0" in page and ">30<" in page
    assert time_report.slow_steps(None) == ""


SLOW_STEPS = """
import sys, time, signal, jax
from lcx.training.loop import train
from lcx.training.stages import run_config
from tests.training import tiny

def slowly(built, step, state, batch):
    time.sleep(0.5)
    return batch

tiny.when_rows(sys.argv[1], int(sys.argv[2]), signal.SIGKILL)
train(run_config(tiny.config()), sys.argv[1], jax.devices()[:1], reweight=slowly)
"""


@pytest.mark.slow
def test_a_kill_costs_at_most_one_save_interval(tmp_path):
    """Killed by SIGKILL behind chosen rows of metrics, with a checkpoint every 4 steps, and resumed; parts still fill the time.

    Steps of half a second: a save, which goes on beside the steps, has ended when the second step after it has.
    """
    begun = time.time()
    kills = (3, 7, 11, 14, 17)
    for count in kills:
        words = [sys.executable, "-c", SLOW_STEPS, str(tmp_path), str(count)]
        assert subprocess.run(words, cwd=Path(tiny.__file__).parents[2], timeout=300).returncode == -9
    train(run_config(tiny.config()), tmp_path, jax.devices()[:1])
    found = summary(metrics.read(tmp_path / FILE))
    assert found.processes == len(kills) + 1 and len(found.lost) == len(kills)
    assert 0 < max(found.lost) <= 4, found.lost
    assert found.parts[goodput.WASTED] >= 0.5 * sum(found.lost)
    assert sum(found.parts.values()) == pytest.approx(found.wall, rel=0.01)
    assert found.wall <= time.time() - begun
    assert (tmp_path / FOLDER / "18").exists()
