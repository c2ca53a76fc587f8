"""Start a run on many hosts: write the files of a platform and hand them to its tool, or start several processes here.

    lcx launch --backend=local --num_processes=4 --config=configs/quickstart.py:smoke --workdir=runs/four
    lcx launch --backend=slurm --nodes=4 --gpus_per_node=8 --config=configs/pods/prolong_8b_512k.py --workdir=/shared/x --dry_run
    lcx launch --backend=local --num_processes=2 -- train --config=configs/quickstart.py:smoke --workdir=runs/two

Words behind -- are another command of lcx to start in place of run. launch/README.md has a page for each platform.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from lcx.cli import config_flags, parse
from lcx.cli.commands import find_command
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.launch import job
from lcx.launch.launch import LOCAL, OPTIONS, check_backend, launch, options_of
from lcx.planning.program import sizes_over
from lcx.recipes.recipe import recipe
from lcx.recipes.sweeps import check_paths, cli_argv, config_of, names, points_of
from lcx.training.profile import profile_steps

WHERE = {
    "num_processes": (int, "local: processes, each with --host_devices CPU devices"),
    "port": (int, "local: the port at which they meet (default: a free one)"),
    "tpu": (str, "tpu_vm, gke: kind of TPU: v4, v5e, v5p, v6e or tpu7x"),
    "topology": (str, "tpu_vm, gke: chips of a slice, as in 4x4 or 2x2x4"),
    "num_slices": (int, "tpu_vm, gke: slices of the job (default: 1)"),
    "spot": (bool, "tpu_vm, gke, skypilot: take capacity that can be preempted"),
    "reserved": (bool, "tpu_vm: take reserved capacity"),
    "zone": (str, "tpu_vm: zone of Google Cloud"),
    "project": (str, "tpu_vm: project of Google Cloud"),
    "runtime_version": (str, "tpu_vm: software version of the hosts (default: the usual one of the kind)"),
    "service_account": (str, "tpu_vm, gke: the account that the hosts or pods act as"),
    "namespace": (str, "gke: namespace of the job (default: default)"),
    "queue": (str, "gke: local queue of Kueue"),
    "nodes": (int, "slurm, skypilot: nodes, with one process each"),
    "gpus_per_node": (int, "slurm: GPUs of a node"),
    "cpus_per_task": (int, "slurm: cores of a node's process"),
    "time": (str, "slurm: time limit, as in 12:00:00; a run that reaches it saves and goes back into the queue"),
    "partition": (str, "slurm: partition"),
    "account": (str, "slurm: account to charge"),
    "accelerators": (str, "skypilot: accelerators of a node, as in H100:8 or tpu-v6e-8"),
    "infra": (str, "skypilot: where, as in gcp/us-central1 or k8s (default: the cheapest)"),
}
"""Flags of the backends; `lcx.launch.launch.OPTIONS` says whose they are."""

COPIES = ("tpu_vm", "gke", "skypilot")
"""Backends whose hosts see a copy of this folder, or an image, in place of this machine's files."""


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("backend", None, f"where to start: {', '.join(OPTIONS)}", flag_values=values)
    config_flags.define(values)
    config_flags.define_profile(values)
    flags.DEFINE_bool("sweep", False, "start one job for each point of the config's sweep", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "only write the files, or print what would run", flag_values=values)
    flags.DEFINE_string("out", None, "folder for files and logs (default: runs/launch/ plus the job's name)", flag_values=values)
    flags.DEFINE_string("name", None, "name of the job (default: that of the config)", flag_values=values)
    flags.DEFINE_integer(
        "max_restarts", None, "how often a job is started again after an interruption (default: 10, local: 0)", flag_values=values
    )
    flags.DEFINE_string("image", None, "container image with lcx, by name", flag_values=values)
    flags.DEFINE_multi_string("mount", [], "SOURCE:/FOLDER to see in the job; may be repeated", flag_values=values)
    flags.DEFINE_multi_string("env", [], "NAME=VALUE to set in the job, readable by all; may be repeated", flag_values=values)
    flags.DEFINE_multi_string(
        "secret", [], "NAME=WHERE, a variable whose value stays where the platform keeps it; may be repeated", flag_values=values
    )
    flags.DEFINE_string("setup", None, "shell command that readies a host without an image", flag_values=values)
    for name, (kind, text) in WHERE.items():
        make = {int: flags.DEFINE_integer, str: flags.DEFINE_string, bool: flags.DEFINE_bool}[kind]
        make(name, None, text, flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Launch."""
    backend = check_backend(values.backend)
    given = {name: values[name].value for name in WHERE if values[name].value is not None}
    if values["host_devices"].present:
        given["host_devices"] = values.host_devices
    options = options_of(backend, given)
    jobs = _sweep_jobs(values, backend, options) if values.sweep else [_job(values, rest, backend, options)]
    if not jobs:
        say("every point of the sweep is finished; lcx sweep with the same config and workdir makes the table")
        return
    name = values.name or job.job_name(_title(values, rest))
    folder = Path(values.out or Path("runs", "launch", name))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file; name a folder")
    if status := launch(backend, jobs, options, folder, values.dry_run):
        sys.exit(status)


def _title(values: flags.FlagValues, rest: Sequence[str]) -> str:
    return config_flags.title(values) if values.config is not None else rest[0]


def _job(values: flags.FlagValues, rest: Sequence[str], backend: str, options: Any) -> job.JobSpec:
    """The one job that is asked for: a run of the config, or the command behind --."""
    if values.config is not None and rest:
        raise UserError(f"unexpected argument {rest[0]!r} beside --config; give a config, or another command behind --, not both")
    if values.config is None:
        if not rest:
            raise UserError("--config is missing; name a file such as configs/quickstart.py, or give a command of lcx behind --")
        find_command(rest)
        for flag in ("workdir", "profile"):
            if values[flag].value is not None:
                raise UserError(f"--{flag} belongs behind --, to the command that is started; move it there")
        return _spec(values, backend, values.name or job.job_name(rest[0]), list(rest), parse.given(rest, "workdir"))
    workdir = _workdir(values)
    _check_config(values, values.config, options)
    profile_steps(values.profile)
    extra = [] if values.profile is None else [f"--profile={values.profile}"]
    words = ["run", f"--config={_reachable(values, backend)}", *config_flags.overrides(values), *extra, f"--workdir={workdir}"]
    return _spec(values, backend, values.name or job.job_name(config_flags.title(values)), words, workdir)


def _sweep_jobs(values: flags.FlagValues, backend: str, options: Any) -> list[job.JobSpec]:
    """A job for each point of the sweep that has no report yet, so far as its folder can be seen from here."""
    if values.config is None:
        raise UserError("--sweep needs --config, a file with get_sweep() such as configs/sweeps/theta_length.py")
    workdir = _workdir(values)
    points = points_of(config_flags.module(values), config_flags.filename(values))
    check_paths(points, values.config)
    argv = cli_argv(_reachable(values, backend), "run", config_flags.overrides(values))
    title, found = values.name or job.job_name(config_flags.title(values)), []
    for name, overrides in zip(names(points), points, strict=True):
        folder = Path(workdir) / "points" / name
        if (folder / "report.html").exists():
            say(f"{name} is finished")
            continue
        try:
            _check_config(values, config_of(overrides, values.config), options)
        except UserError as error:
            raise UserError(f"point {name} of the sweep: {error}") from error
        words = list(argv(overrides, folder))
        words = words[words.index("lcx.cli") + 1 :]
        found.append(_spec(values, backend, job.job_name(f"{title}-{name}"), words, str(folder)))
    return found


def _workdir(values: flags.FlagValues) -> str:
    if values.workdir == "":
        raise UserError("--workdir= is empty; name a directory or omit the flag")
    return values.workdir or str(Path("runs") / config_flags.title(values))


def _check_config(values: flags.FlagValues, config: ml_collections.ConfigDict, options: Any) -> None:
    """Raises `UserError` for a config that cannot work on the devices of a job, so far as can be told before they are paid for."""
    if complete := getattr(config_flags.module(values), "complete", None):
        source = str(config.get("source"))
        if not Path(source).exists() or Path(source).suffix in (".yml", ".yaml"):
            return  # the model is read, or merged first, where the job runs
        config = complete(config)
    run = recipe(config).run
    if options.devices is not None:
        for index in range(len(run.stages)):
            sizes_over(run, index, options.devices, options.num_slices)


def _reachable(values: flags.FlagValues, backend: str) -> str:
    """The config as the job's hosts name it; raises `UserError` where they have no such file."""
    name = values["config"].config_filename
    path = Path(name.partition(":")[0])
    if backend not in COPIES:
        return name
    if not path.resolve().is_relative_to(Path.cwd()):
        raise UserError(
            f"--config={path} lies outside this folder, which is all that the hosts of --backend={backend} see; move it here"
        )
    return str(path.resolve().relative_to(Path.cwd())) + name[len(str(path)) :] if path.is_absolute() else name


def _spec(values: flags.FlagValues, backend: str, name: str, words: list[str], workdir: str | None) -> job.JobSpec:
    restarts = values.max_restarts if values.max_restarts is not None else 0 if backend == LOCAL else 10
    return job.JobSpec(
        name=name,
        words=tuple(words),
        workdir=workdir,
        image=values.image,
        mounts=job.mounts(values.mount),
        env=job.environment(values.env),
        secrets=job.named("secret", values.secret, "where"),
        setup=values.setup,
        max_restarts=restarts,
    )
