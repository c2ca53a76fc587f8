"""Several processes with two devices each, which meet on loopback, do what one process does; and end as they should."""

import json
import signal
import time

import pytest

from lcx.cli import parse
from lcx.core import exits
from lcx.recipes.doremi import find_mixture
from lcx.recipes.recipe import recipe
from lcx.training.doremi import DoReMiConfig
from lcx.training.loop import train
from lcx.training.metrics import TIMING
from tests.cli.command import CONFIG, lcx
from tests.launch import job, kills

MESHES = ("fsdp=4", "tensor=4", "context=4", "context=4,strategy=ring", "context=4,ulysses=4", "fsdp=2,expert=2")
WIDER = ("fsdp=8", "tensor=8", "context=8,strategy=ring", "context=8,ulysses=4", "fsdp=2,expert=4")


def rows(workdir):
    """The rows of metrics of a run, without what differs between two runs."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if key not in TIMING} for line in lines]


def close(found, expected):
    """Whether numbers are those of another run within 1e-6 of their size, or of 1."""
    return all(abs(x - y) <= 1e-6 * max(1.0, abs(y)) for x, y in zip(found, expected, strict=True))


SHORT = """
from tests.cli import tiny

def get_config():
    config = tiny.get_config()
    del config.stages["longer"]
    config.stage_order = ("base",)
    return config
"""
JUDGED = """
from tests.cli import tiny

def get_config():
    config = tiny.get_config()
    config.stages.base.seq_len, config.stages.longer.seq_len = 128, 256
    config.stages.longer.steps, config.monitor.steps = 9, 8
    config.monitor.enabled, config.monitor.skip, config.monitor.retries = True, 0, 1
    return config
"""
SECOND = 'config.data.parts.other = {"weight": 2.0, "source": {"kind": "stdlib", "limit_bytes": 300_000}}'


def train_twice(text, tmp_path, devices):
    """Train a config in two processes, in `two`, and in this one, in `one`."""
    (config := tmp_path / "config.py").write_text(text)
    started = job.lcx(["train", f"--config={config}", f"--workdir={tmp_path / 'two'}"], 2, tmp_path / "logs")
    train(recipe(parse.load(str(config))).run, tmp_path / "one", devices[:4])
    assert job.ended(started) == [0, 0], job.said(tmp_path / "logs", 0)[-2000:]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, devices):
    train_twice(SHORT, tmp_path, devices)
    found, expected = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert len(found) == 2
    assert close([row["loss"] for row in found], [row["loss"] for row in expected])
    assert close([row["grad_norm"] for row in found], [row["grad_norm"] for row in expected])
    # Standard output is process 0's.
    assert "trained 2 steps" in job.said(tmp_path / "logs", 0) and "trained 2 steps" not in job.said(tmp_path / "logs", 1)


@pytest.mark.slow
def test_two_processes_judge_as_one(tmp_path, devices):
    """Text and needles of the monitor's probe lie in different rows, so that each process measures others."""
    train_twice(JUDGED, tmp_path, devices)
    found, expected = (json.loads((tmp_path / name / "decisions.jsonl").read_text().splitlines()[0]) for name in ("two", "one"))
    assert found["verdict"] == expected["verdict"]
    for probe in ("probe_before", "probe_after"):
        assert found[probe]["needle_loss"] != pytest.approx(found[probe]["text_loss"], rel=1e-3)
        assert close(found[probe].values(), expected[probe].values())


@pytest.mark.slow
def test_two_processes_weigh_a_mixture_as_one(tmp_path, devices):
    (config := tmp_path / "short.py").write_text(SHORT.replace("    return", f"    {SECOND}\n    return"))
    command = ["doremi", f"--config={config}", f"--workdir={tmp_path / 'two'}"]
    expected = find_mixture(recipe(parse.load(str(config))).run, tmp_path / "one", DoReMiConfig(), devices=devices[:4])
    # The second job finds all done, and says the same.
    for folder in ("first", "second"):
        started = job.lcx(command, 2, tmp_path / folder)
        assert job.ended(started) == [0, 0], job.said(tmp_path / folder, 0)[-2000:]
        assert "config.stages.base.mixture" in job.said(tmp_path / folder, 0)
    found = json.loads((tmp_path / "two" / "mixture.json").read_text())["mixture"]
    assert found.keys() == expected.keys() and close(found.values(), expected.values())
    assert len((tmp_path / "two" / "proxy" / "doremi.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("count", "meshes"), [(2, MESHES), (4, WIDER)])
def test_meshes_that_cross_processes(count, meshes, tmp_path):
    folder = tmp_path / "many"
    assert job.program(job.ROOT / "tests/launch/meshes.py", count, folder, folder, *meshes) == [0] * count, job.said(folder, 0)
    alone = tmp_path / "one"
    assert job.program(job.ROOT / "tests/launch/meshes.py", 1, alone, alone, *meshes, devices=2 * count) == [0]
    for mesh in meshes:
        found, expected = (json.loads((place / f"{mesh}.json").read_text()) for place in (folder, alone))
        for name in ("loss", "grad_norm", "evaluation"):
            assert close(found[name], expected[name]), (mesh, name, found[name], expected[name])
        assert found["generated"] == expected["generated"], mesh
        whole = json.loads((alone / f"{mesh}.0.share").read_text())
        for process in range(count):
            own = json.loads((folder / f"{mesh}.{process}.share").read_text())
            # Heads, experts' matrices and the pieces of an all-to-all need the same rows on all devices; other axes split them.
            part = 1 if mesh.startswith("tensor") else 1 / count
            assert own["bytes"] == part * whole["bytes"], (mesh, own, whole)
            assert own["tokens"] <= part * 1.2 * whole["tokens"]


@pytest.mark.slow
def test_four_then_two_then_three_processes(tmp_path):
    """The same batches, and so the losses of a run that nothing has moved."""
    words = ["train", f"--config={kills.CONFIG}", "--config.stages.base.batch_size=24", "--config.stages.longer.batch_size=24"]
    words += ["--config.stages.base.steps=3", "--config.stages.longer.steps=6", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]
    expected = tmp_path / "one"
    assert lcx([*words, f"--workdir={expected}"]).returncode == 0
    for attempt, count in enumerate([4, 2, 3]):
        logs, path = tmp_path / f"logs{attempt}", tmp_path / "many" / "metrics.jsonl"
        before = path.read_bytes().count(b"\n") if path.exists() else 0
        started = job.lcx([*words, f"--workdir={tmp_path / 'many'}", "--config.checkpoint.every=1"], count, logs)
        if count != 3:
            until = time.time() + 600
            while time.time() < until and (not path.exists() or path.read_bytes().count(b"\n") <= before):
                time.sleep(0.02)
            started[-1].send_signal(signal.SIGTERM)
        assert set(job.ended(started)) <= {0, exits.PREEMPTED}, job.said(logs, 0)[-2000:]
    found = rows(tmp_path / "many")
    assert len(found) == 9
    assert close([row["loss"] for row in found], [row["loss"] for row in rows(expected)])
    assert [row["weight"] for row in found] == [row["weight"] for row in rows(expected)]
    assert "resuming from step" in job.said(tmp_path / "logs2", 0)


@pytest.mark.slow
def test_one_host_with_another_config(tmp_path):
    words, port = ["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"], job.free_port()
    started = job.lcx(words, 2, tmp_path / "logs", port=port, only=[0])
    started += job.lcx([*words, "--config.seed=7"], 2, tmp_path / "logs", port=port, only=[1])
    assert job.ended(started, 120) == [exits.WRONG] * 2
    for process in range(2):
        assert "--config.seed is 7 in process 1 on" in job.said(tmp_path / "logs", process)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_jobs_in_one_workdir(tmp_path):
    words = ["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--config.stages.base.steps=400"]
    first = job.lcx(words, 2, tmp_path / "first")
    path = tmp_path / "run" / "metrics.jsonl"
    while not path.exists() and all(process.poll() is None for process in first):
        time.sleep(0.1)
    second = job.lcx(words, 2, tmp_path / "second")
    assert job.ended(second, 240) == [exits.WRONG] * 2
    for process in range(2):
        assert "is in use by process" in job.said(tmp_path / "second", process)
    first[1].send_signal(signal.SIGTERM)
    assert job.ended(first, 240) == [exits.PREEMPTED] * 2


@pytest.mark.slow
def test_a_process_that_never_comes(tmp_path):
    words = ["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    begun = time.time()
    started = job.lcx(words, 2, tmp_path / "logs", only=[0], initialization_timeout=15)
    assert job.ended(started, 120) == [exits.RESTART] and time.time() - begun < 90
    text = job.said(tmp_path / "logs", 0)
    assert "error: not all processes that the command line names have started within 15 s; start the others" in text
    assert "Check failure" not in text and "MEGASCALE" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("SIGKILL", 3), ("SIGTERM", 2), ("SIGSTOP", 1)])
def test_signals_at_random_moments(name, number, tmp_path):
    summary = kills.main([f"--folder={tmp_path}", f"--signal={name}", f"--number={number}"])
    assert not summary["wrong"], summary
