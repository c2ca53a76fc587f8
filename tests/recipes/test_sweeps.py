import csv
import json
import os
import signal
import sys

import ml_collections
import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.recipes.sweeps import chain, check_paths, check_start, cli_argv, collect_run, names, param, prod, run_sweep, zip_
from lcx.report import sweep_plots
from lcx.report.sweep_plots import PointResult
from tests.report.synthetic import write_run

BASE = ml_collections.ConfigDict({"optim": {"lr": 1e-3}, "stages": {"far": {"theta": 1e4, "seq_len": 64}}, "seed": 0})


def test_combinators():
    lr, seed = param("optim.lr", 1e-3, 1e-4), param("seed", 0, 1)
    assert prod(lr, seed) == [{"optim.lr": a, "seed": b} for a in (1e-3, 1e-4) for b in (0, 1)]
    assert zip_(lr, seed) == [{"optim.lr": 1e-3, "seed": 0}, {"optim.lr": 1e-4, "seed": 1}]
    assert chain(lr, param("optim.lr", 1e-4, 1e-5)) == [{"optim.lr": x} for x in (1e-3, 1e-4, 1e-5)]
    assert prod() == [{}]
    with pytest.raises(UserError, match="zip_ needs sweeps of equal length; got lengths 2, 3"):
        zip_(lr, param("seed", 0, 1, 2))
    with pytest.raises(UserError, match="sets 'seed' twice in one point"):
        prod(seed, seed)
    with pytest.raises(UserError, match="has no values"):
        param("seed")


def test_names_are_short_readable_and_distinct():
    points = prod(param("stages.far.theta", 1e3, 16000.0), param("seed", 0, 1))
    assert names(points) == ["theta=1000,seed=0", "theta=1000,seed=1", "theta=16000,seed=0", "theta=16000,seed=1"]
    points = prod(param("stages.far.theta", 500), param("stages.near.theta", 0.25))
    assert names(points) == ["far.theta=500,near.theta=0.25"]
    points = prod(param("stages.far.positions.default", 5e3), param("evals.lengths", (64, 128)))
    assert names(points) == ["positions=5000"]
    assert len(set(names(param("evals.lengths", (64,), (64, 128))))) == 2
    points = param("positions.default", "yarn:factor=16", "a/b c", "a b/c")
    assert len(set(names(points))) == 3 and not set("".join(names(points))) & set("/: ")
    assert names(points) == names(points)
    assert all(len(name) <= 100 for name in names(param("text", "x" * 300, "x" * 301)))
    assert names([{}]) == ["base"]
    with pytest.raises(UserError, match="twice"):
        names([{"seed": 1}, {"seed": 1}])


def test_unknown_paths_are_answered_with_the_nearest():
    check_paths(prod(param("stages.far.theta", 1.0), param("optim", 3)), BASE)
    check_paths(param("stages[1].theta", 1.0), {"stages": [{"theta": 1}, {"theta": 2}]})
    with pytest.raises(UserError, match=r"'stages.far.thta', which the config does not have; did you mean 'stages.far.theta'"):
        check_paths(param("stages.far.thta", 1.0), BASE)
    with pytest.raises(UserError, match=r"did you mean 'stages\[1\].theta'"):
        check_paths(param("stages[1].teta", 1.0), {"stages": [{"theta": 1}, {"theta": 2}]})


def test_missing_first_weights_are_said_once(tmp_path):
    base = {**BASE.to_dict(), "init_from": str(tmp_path / "base")}
    with pytest.raises(UserError, match=r"base' is neither a directory nor a GGUF file; train these weights first"):
        run_sweep(param("seed", 0, 1), base, tmp_path, cli_argv("configs/x.py"))
    assert not (tmp_path / "points").exists()


def test_a_sweep_may_begin_with_a_gguf_file(tmp_path):
    (file := tmp_path / "model.gguf").write_bytes(b"GGUF")
    check_start(param("seed", 0, 1), {**BASE.to_dict(), "init_from": str(file)})
    with pytest.raises(UserError, match="model.bin' is neither"):
        check_start(param("init_from", str(file), str(tmp_path / "model.bin")), BASE.to_dict())


def test_command_line_of_a_point(tmp_path):
    words = cli_argv("configs/x.py")({"stages.far.positions.global": 500.0}, tmp_path)
    assert '--config.stages.far.positions["global"]=500' in words
    argv = cli_argv("configs/x.py", "run", ["--config.seed=3"])(
        {"optim.lr": 0.001, "a.on": True, "a.n": 4.0, "a.t": (1, 2)}, tmp_path
    )
    flags = ["--config=configs/x.py", "--config.seed=3", "--config.optim.lr=0.001", "--config.a.on=true", "--config.a.n=4"]
    assert argv == [sys.executable, "-m", "lcx.cli", "run", *flags, "--config.a.t=(1, 2)", f"--workdir={tmp_path}"]


SCRIPT = """
import json, os, pathlib, signal, sys
seed, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
with open(folder.parent / "calls", "a") as calls:
    calls.write(f"{seed} ")
if seed == 1 and not (folder / "second").exists():
    (folder / "second").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 2:
    sys.exit("error: theta is negative")
if seed == 3:
    import time
    time.sleep(60)
(folder / "numbers").write_text(json.dumps({"needles": seed / 10, "loss": 1.5}))
"""


def runner(overrides, folder):
    return [sys.executable, "-c", SCRIPT, str(overrides["seed"]), str(folder)]


def numbers(folder):
    return json.loads((folder / "numbers").read_text())


def test_the_sweep_survives_what_goes_wrong_and_finishes_the_rest_later(tmp_path, capsys):
    points = param("seed", 0, 1, 2, 4)
    first = run_sweep(points, BASE, tmp_path, runner, collect=numbers)
    assert [r.status for r in first] == ["finished", "failed", "failed", "finished"]
    assert first[1].reason.startswith("killed by SIGKILL") and first[2].reason == "exit status 1: error: theta is negative"
    assert json.loads((tmp_path / "points" / "seed=1" / "failed.json").read_text())["reason"] == first[1].reason
    calls = tmp_path / "points" / "calls"
    assert calls.read_text() == "0 1 2 4 "
    second = run_sweep(points, BASE, tmp_path, runner, collect=numbers)
    assert [r.status for r in second] == ["finished", "finished", "failed", "finished"]
    assert calls.read_text() == "0 1 2 4 1 2 "  # what is finished is not run again
    assert not (tmp_path / "points" / "seed=1" / "failed.json").exists()
    assert [r.numbers.get("needles") for r in second] == [0.0, 0.1, None, 0.4]
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in written] == ["seed=0", "seed=1", "seed=2", "seed=4"]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["needles"] for row in rows] == ["0.0", "0.1", "", "0.4"] and rows[2]["status"] == "failed"
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "killed by SIGKILL" in shown and "results.json" in shown


def test_a_point_that_takes_too_long_or_cannot_start_is_recorded(tmp_path):
    (slow,) = run_sweep(param("seed", 3), BASE, tmp_path, runner, collect=numbers, timeout=0.5)
    assert slow.reason == "it took longer than 0.5 s"
    (missing,) = run_sweep(param("seed", 5), BASE, tmp_path, lambda *_: ["/no/such/program"])
    assert missing.reason.startswith("it could not be started")
    (empty,) = run_sweep(param("seed", 6), BASE, tmp_path, lambda *_: [sys.executable, "-c", ""])
    assert empty.reason.startswith("it ended well but its results cannot be read")


def test_a_finished_point_is_not_taken_for_another(tmp_path):
    run_sweep(param("seed", 0), BASE, tmp_path, runner, collect=numbers)
    (result := tmp_path / "points" / "seed=0" / "result.json").write_text(result.read_text().replace('"seed": 0', '"seed": 9'))
    with pytest.raises(UserError, match="holds a point with overrides that differ"):
        run_sweep(param("seed", 0), BASE, tmp_path, runner, collect=numbers)


def test_a_wrong_path_stops_the_sweep_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="did you mean 'seed'"):
        run_sweep(param("sed", 0), BASE, tmp_path, runner)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_passed_on(tmp_path):
    def interrupted(overrides, folder):
        return [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGINT)"]

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(param("seed", 0), BASE, tmp_path, interrupted, collect=numbers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "points" / "seed=0" / "result.json").exists()


def test_a_terminated_sweep_takes_its_point_along(tmp_path):
    script = (
        "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    with pytest.raises(SystemExit) as ended:
        run_sweep(param("seed", 0), BASE, tmp_path, lambda _, folder: [sys.executable, "-c", script.format(str(folder / "pid"))])
    assert ended.value.code == 143
    if (pid := tmp_path / "points" / "seed=0" / "pid").exists() and pid.read_text():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_the_numbers_of_a_run(tmp_path):
    write_run(tmp_path)
    found = collect_run(tmp_path)
    assert found["needles"] == pytest.approx(237 / 240) and found["worst_cell"] == 0.9 and found["effective_length"] == 4096
    assert found["perplexity"] == pytest.approx(3.25) and found["train_seconds"] == 320
    assert found["needles_by_length"] == pytest.approx({"256": 1.0, "512": 1.0, "1024": 58 / 60, "4096": 59 / 60})


def result(overrides, **values) -> PointResult:
    return PointResult(str(overrides), overrides, "finished", numbers=values)


def test_two_settings_make_a_heatmap_with_length_across():
    found = [result({"s.seq_len": n, "s.theta": t}, needles=n / 4096 * (t > 1e3)) for n in (1024, 4096) for t in (500.0, 4e3, 16e3)]
    axes = sweep_plots.figure(found).axes[0]
    assert np.array_equal(axes.images[0].get_array(), [[0, 0], [25, 100], [25, 100]])
    assert [x.get_text() for x in axes.get_xticklabels()] == ["1K", "4K"]
    assert [x.get_text() for x in axes.get_yticklabels()] == ["500", "4,000", "16K"]
    seeds = [result({"a": a, "b": 1 + b, "seed": s}, loss=a + s) for a in (1, 2) for b in (0, 1) for s in (0, 1)]
    assert np.array_equal(sweep_plots.figure(seeds).axes[0].images[0].get_array(), [[1.5, 1.5], [2.5, 2.5]])


def test_one_setting_makes_a_line_or_a_map_over_length():
    line = sweep_plots.figure([result({"theta": t, "x": 1}, loss=y) for t, y in ((100.0, 3.0), (1e4, 1.0), (1e3, 2.0))]).axes[0]
    assert line.lines[0].get_xydata().tolist() == [[100, 3], [1e3, 2], [1e4, 1]] and line.get_xscale() == "log"
    by_length = [
        result({"positions": name}, perplexity=2.0, perplexity_by_length={"256": 4.0, "1024": y})
        for name, y in (("yarn", 5.0), ("linear", 9.0))
    ]
    grid = sweep_plots.figure(by_length).axes[0]
    assert np.array_equal(grid.images[0].get_array(), [[4, 5], [4, 9]])
    assert [x.get_text() for x in grid.get_yticklabels()] == ["yarn", "linear"]


def test_thetas_of_each_length_of_its_own_make_lines():
    found = [result({"theta": float(n * m), "seq_len": n}, needles=m / 4) for n in (512, 2048, 8192) for m in (1, 2, 3)]
    axes = sweep_plots.figure(found).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[512, 25], [1024, 50], [1536, 75]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["length 512", "length 2K", "length 8K"]
    together = [result({"theta": t, "seq_len": n}, needles=t / n) for t, n in ((1.0, 8), (2.0, 8), (3.0, 8), (3.0, 16), (3.0, 32))]
    axes = sweep_plots.figure(together).axes[0]
    assert axes.get_legend() is None and {text.get_text() for text in axes.texts} == {"length 8", "length 16", "length 32"}


def test_nothing_to_draw():
    assert sweep_plots.figure([PointResult("a", {}, "failed", "killed")]) is None
    assert sweep_plots.figure([result({"a": 1}, other=2.0)]) is None
    assert sweep_plots.figure([result({"a": 1}, other=2.0), result({"a": 2}, other=3.0)], "other") is not None


def test_a_point_that_ran_elsewhere_is_collected(tmp_path):
    """What `lcx launch --sweep` starts leaves reports; collecting runs nothing."""
    points = param("seed", 0, 1)
    (done := tmp_path / "points" / "seed=0").mkdir(parents=True)
    (done / "report.html").write_text("")
    (done / "numbers").write_text('{"loss": 2.5}')
    first, second = run_sweep(points, BASE, tmp_path, lambda *_: ["/no/such/program"], collect=numbers, only_collect=True)
    assert (first.status, first.numbers) == ("finished", {"loss": 2.5})
    assert (second.status, second.reason) == ("failed", "not finished: it has no report yet")
    assert (done / "result.json").exists() and not (tmp_path / "points" / "seed=1").exists()


@pytest.mark.slow
def test_points_are_tasks_of_a_ray_cluster(tmp_path):
    pytest.importorskip("ray")
    from lcx.data.curation import cluster

    points = param("seed", 0, 1, 2, 4)
    for wanted in (["finished", "failed", "failed", "finished"], ["finished", "finished", "failed", "finished"]):
        with cluster.engine(workers=2, num_cpus=0.5) as runner:
            found = run_sweep(points, BASE, tmp_path, runner_of(tmp_path), collect=numbers, runner=runner)
        assert [result.status for result in found] == wanted
    assert found[2].reason == "exit status 1: error: theta is negative" and found[3].numbers["needles"] == 0.4


def runner_of(tmp_path):
    return lambda overrides, folder: [sys.executable, "-c", SCRIPT, str(overrides["seed"]), str(folder)]
