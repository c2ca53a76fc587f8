"""`lcx launch` as it is typed: files, what would run, sweeps, and one sentence for what is wrong."""

import re
import shlex
from pathlib import Path

import pytest

from lcx.cli import sweep
from lcx.cli.main import main
from lcx.report.sweep_plots import PointResult
from tests.cli.command import CONFIG

SWEEP = """
from tests.cli.tiny import get_config
from lcx.recipes.sweeps import param

def get_sweep():
    return param("seed", 0, 1, 2)
"""

SLURM = "launch --backend=slurm --nodes=2 --dry_run --out={out} "
GKE = "launch --backend=gke --tpu=v5e --topology=4x4 --image=host/lcx:1 --mount=gs://b:/mnt/b --dry_run --out={out} "
LOCAL = "launch --backend=local --num_processes=2 --host_devices=4 --dry_run "

WRONG = {
    "launch": "--backend is missing; choose one of local, tpu_vm, gke, slurm, skypilot",
    "launch --backend=slrum --config={config}": "--backend=slrum is unknown; did you mean 'slurm'?",
    "launch --backend=slurm --config={config}": "--backend=slurm needs --nodes; see lcx launch --help",
    "launch --backend=slurm --nodes=two --config={config}": "invalid value --nodes=two: expected an integer",
    "launch --backend=slurm --nodes=0 --config={config}": "--nodes=0 must be at least 1",
    "launch --backend=slurm --nodes=1 --zone=a --config={config}": "--zone belongs to --backend=tpu_vm, not to --backend=slurm",
    "launch --backend=slurm --nodes=1 --host_devices=2 --config={config}": "--host_devices belongs to --backend=local, not to",
    "launch --backend=local --nodes=1 --config={config}": "--nodes belongs to --backend=slurm, --backend=skypilot, not to",
    "launch --backend=local": "--config is missing; name a file such as configs/quickstart.py, or give a command of lcx behind --",
    "launch --backend=local -- tarin": "lcx has no command 'tarin'; did you mean 'train'?",
    "launch --backend=local --config={config} -- train": "unexpected argument 'train' beside --config; give a config, or another",
    "launch --backend=local --workdir=x -- train": "--workdir belongs behind --, to the command that is started; move it there",
    "launch --backend=local --config={config} --name=Big": "--name=Big cannot name a job",
    "launch --backend=local --config={config} --max_restarts=-1": "--max_restarts=-1 must not be negative",
    "launch --backend=local --config={config} --image=a": "--image gives an image, which --backend=local does not take",
    "launch --backend=local --config={config} --workdir=": "--workdir= is empty",
    "launch --backend=local --config={config} --out={file}": "is a file; name a folder",
    "launch --backend=local --config={config} --sweep": "has no get_sweep(); define it",
    "sweep --config={sweep} --workers=2": "--workers=2 needs --engine=ray; add it",
    "sweep --config={sweep} --point_gpus=1": "--point_gpus=1.0 needs --engine=ray; add it",
    "sweep --config={sweep} --engine=ray --collect": "--collect runs nothing, so --engine=ray has no effect",
    "sweep --config={sweep} --engine=ray --workers=0": "--workers=0 must be at least 1",
    "launch --backend=local --sweep -- train": "--sweep needs --config, a file with get_sweep()",
    SLURM
    + "--config={config} --env=HF_TOKEN=x": "--env=HF_TOKEN=... would write its value into a file; give --secret=HF_TOKEN=WHERE",
    SLURM + "--config={config} --config.optim.lrr=1": "--config.optim.lrr",
    SLURM + "--config={config} --config.optim.lr=-1": "optim.lr=-1.0 must be above 0",
    SLURM + "--config={config} --mount=a": "--mount=a is not of the form SOURCE:/FOLDER",
    SLURM + "--config={config} --profile=1-2": "--profile=1-2 is not a range of steps; give the first and the last, as in",
    SLURM + "--config={config} --gpus_per_node=3 --config.mesh.context=4": "need a multiple of 4 devices and 6 are available",
    SLURM + "--config={config} --gpus_per_node=3": "stages.base.batch_size=8 must be divisible by 6",
    SLURM + "--config=configs/extend_hf.py --config.source={file}": "config.target is missing; give the length to reach",
    GKE + "--config={near} --workdir=/mnt/b/x --num_slices=2 --config.mesh.fsdp=1 --config.mesh.context=32": "2 TPU slices cannot",
    GKE + "--config={far} --config.mesh.context=2 --workdir=/mnt/b/x": (
        "lies outside this folder, which is all that the hosts of --backend=gke see"
    ),
    GKE + "--config={near} --config.mesh.context=2 --workdir=/x": "would be a folder of its own on each of 4 hosts",
    GKE + "--config={near} --config.mesh.context=2 --workdir=/mnt/b/x --setup=x": (
        "--setup gives a setup, which --backend=gke does not take"
    ),
}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "far.py").write_text(SWEEP)
    (tmp_path / "sweep.py").write_text(SWEEP)
    near = CONFIG.relative_to(Path.cwd())
    names = {"out": tmp_path / "out", "file": tmp_path / "file", "far": tmp_path / "far.py", "sweep": tmp_path / "sweep.py"}
    return {**names, "config": CONFIG, "near": near, "run": tmp_path / "run"}


@pytest.mark.parametrize("typed", WRONG)
def test_one_sentence(typed, places, capsys):
    with pytest.raises(SystemExit) as left:
        main(shlex.split(typed.format(**places)))
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 1 and len(said) == 1 and said[0].startswith("error: ") and WRONG[typed] in said[0], said
    assert not places["out"].exists()


def test_a_script_is_written_with_what_was_typed(places, capsys):
    main(shlex.split((SLURM + "--config={config} --config.seed=3 --workdir={run} --profile=1:2@all --name=mine").format(**places)))
    text = (places["out"] / "mine.sbatch").read_text()
    for word in ("--config.seed=3", f"--workdir={places['run']}", "--profile=1:2@all", "--distributed=auto"):
        assert f"    {word}" in text
    assert "to start it: sbatch --output=" in capsys.readouterr().out


SPELLED = "--config.seed 7 --noconfig.monitor.enabled -config.optim.lr=0.5 --config.execution.remat block"


def test_values_of_the_config_are_passed_on_however_they_are_written(places):
    main(shlex.split((SLURM + "--config={config} " + SPELLED + " --workdir={run} --name=mine").format(**places)))
    words = (places["out"] / "mine.sbatch").read_text().replace(" \\", "").split()
    for word in ("--config.seed=7", "--config.monitor.enabled=false", "--config.optim.lr=0.5", "--config.execution.remat=block"):
        assert word in words
    assert not {"7", "block"} & set(words)


def test_a_sweep_passes_on_what_was_typed_and_says_when_a_point_failed(places, monkeypatch):
    started = []

    def failing(points, base, workdir, argv, **_):
        started.append(argv({"seed": 1}, workdir))
        return [PointResult("seed=1", {"seed": 1}, "failed", "x")]

    monkeypatch.setattr(sweep, "run_sweep", failing)
    typed = ("sweep --config={sweep} --noconfig.monitor.enabled -config.optim.lr 0.5 --workdir={run}").format(**places)
    with pytest.raises(SystemExit) as left:
        main(shlex.split(typed))
    assert left.value.code == 1
    assert started[0][3:] == [
        *("run", f"--config={places['sweep']}", "--config.monitor.enabled=false", "--config.optim.lr=0.5", "--config.seed=1"),
        f"--workdir={places['run']}",
    ]
    places["run"].mkdir()
    main([*shlex.split(typed), "--collect"])  # what has failed is shown


def test_a_copied_folder_has_relative_configs(places):
    main(shlex.split((GKE + "--config={config} --config.mesh.context=2 --workdir=/mnt/b/x").format(**places)))
    assert f'"--config={places["near"]}"' in (places["out"] / "tiny.jobset.yaml").read_text()


def test_here_it_says_what_would_run(places, capsys):
    main(shlex.split((LOCAL + "--config={config} --workdir={run}").format(**places)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith(
        f"-m lcx.cli run --config={CONFIG} --workdir={places['run']} --host_devices=4 "
        "--distributed=127.0.0.1:8476 --num_processes=2 --process_id=1"
    )
    main(shlex.split((LOCAL + "-- eval --checkpoint={run} --lengths=64").format(**places)))
    assert f"-m lcx.cli eval --checkpoint={places['run']} --lengths=64 --host_devices=4 --dist" in capsys.readouterr().out


def test_a_sweep_is_a_job_a_point_without_the_finished_ones(places, capsys):
    typed = (SLURM + "--config={sweep} --config.optim.lr=0.5 --workdir={run} --sweep").format(**places)
    main(shlex.split(typed))
    files = sorted(places["out"].iterdir())
    assert len(files) == 3 and all(path.suffix == ".sbatch" for path in files)
    texts = [path.read_text() for path in files]
    for seed in range(3):
        (text,) = [text for text in texts if f"--config.seed={seed}\n" in text.replace(" \\", "")]
        assert f"--workdir={places['run']}/points/seed={seed}" in text and "--config.optim.lr=0.5" in text
        assert "--dependency=singleton" in text
    assert len({re.search("job-name=(.*)", text)[1] for text in texts}) == 3
    (done := places["run"] / "points" / "seed=1").mkdir(parents=True)
    (done / "report.html").write_text("")
    capsys.readouterr()
    main(shlex.split(typed.replace(str(places["out"]), str(places["out"] / "again"))))
    assert "seed=1 is finished" in capsys.readouterr().out
    assert len(list((places["out"] / "again").iterdir())) == 2


def test_a_point_that_does_not_fit_is_refused_before_any_is_started(places, capsys):
    places["sweep"].write_text(SWEEP.replace('"seed", 0, 1, 2', '"mesh.context", 4, 3'))
    with pytest.raises(SystemExit):
        main(shlex.split((LOCAL + "--config={sweep} --workdir={run} --sweep").format(**places)))
    said = capsys.readouterr()
    assert "error: point context=3 of the sweep: mesh axes" in said.err and "8 are available" in said.err and not said.out


PAGE = (Path(__file__).parents[2] / "launch" / "README.md").read_text().replace("\\\n", " ")


@pytest.mark.parametrize("line", re.findall(r"^lcx (launch .*?)(?: #.*)?$", PAGE, re.MULTILINE))
def test_the_page_has_commands_that_fit(line, tmp_path):
    main([*shlex.split(line), "--dry_run", f"--out={tmp_path}"])
