"""A job written as files and handed to the tool that owns them, or run on this machine."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx.core.configs import nearest
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.numbers import counted
from lcx.launch import local
from lcx.launch.backends.table import BACKENDS
from lcx.launch.job import Backend, JobSpec
from lcx.launch.local import Processes

LOCAL = "local"

OPTIONS: dict[str, type] = {LOCAL: Processes, **{name: backend.options for name, backend in BACKENDS.items()}}
"""Value of `--backend` -> the dataclass of its own options."""

CARRIED = {"image": "an image", "mounts": "mounts", "env": "variables", "secrets": "secrets", "setup": "a setup"}
"""Fields of a job that not every backend can honour, in words."""


def options_of(backend: str, given: Mapping[str, Any]) -> Any:
    """The options of a backend from the flags that were given; raises `UserError` for those of others and for missing ones."""
    fields = {field.name: field for field in dataclasses.fields(OPTIONS[backend])}
    for flag in given:
        if flag not in fields:
            owners = ", ".join(f"--backend={name}" for name, kind in OPTIONS.items() if flag in _names(kind))
            raise UserError(f"--{flag} belongs to {owners}, not to --backend={backend}; leave it out")
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given]
    if needed:
        raise UserError(f"--backend={backend} needs {', '.join(f'--{name}' for name in needed)}; see lcx launch --help")
    return OPTIONS[backend](**given)


def refuse_ignored(backend: str, job: JobSpec) -> None:
    """Raises `UserError` for what a job has and the backend would ignore."""
    takes = frozenset() if backend == LOCAL else BACKENDS[backend].takes
    for field, what in CARRIED.items():
        if getattr(job, field) and field not in takes:
            flag = field.removesuffix("s") if field != "mounts" else "mount"
            why = "its processes have this shell's folders and environment" if backend == LOCAL else "its image holds what it needs"
            raise UserError(f"--{flag} gives {what}, which --backend={backend} does not take: {why}; leave it out")
    if job.image is not None and job.setup is not None:
        raise UserError("--setup readies a host without an image, and --image has its own setup; give one of them")


def launch(backend: str, jobs: Sequence[JobSpec], options: Any, folder: Path, dry_run: bool = False) -> int:
    """Start jobs, one after the other; returns the exit status, 0 unless a job on this machine ended with another.

    Platforms get files in `folder` and, without `dry_run`, the command that submits them; on this machine jobs run, with
    what they say in logs there, and `dry_run` prints their command lines. Raises `UserError` for what a backend cannot do and for a
    tool that is missing or refuses.
    """
    for job in jobs:
        refuse_ignored(backend, job)
    if backend == LOCAL:
        return _here(jobs, options, folder, dry_run)
    of = BACKENDS[backend]
    # All of them are made before the first one is written: a job that cannot be leaves none behind.
    made = [of.files(job, options) for job in jobs]
    if not dry_run and shutil.which(of.tool) is None:
        raise UserError(
            f"--backend={backend} needs {of.tool}, which is not on the PATH of this machine; install it, or add --dry_run to only "
            "write the files"
        )
    for job, files in zip(jobs, made, strict=True):
        written = [write_atomically(folder / name, text) for name, text in files.items()]
        for path in written:
            say(f"wrote {path}")
        words = of.submit(job, options, written[0])
        if dry_run:
            say(f"to start it: {shlex.join(words)}")
        else:
            _submit(of, words)
    return 0


def _here(jobs: Sequence[JobSpec], options: Processes, folder: Path, dry_run: bool) -> int:
    worst = 0
    for job in jobs:
        place = folder / job.name if len(jobs) > 1 else folder
        if dry_run:
            for words in local.commands(job, options, options.port or local.EXAMPLE_PORT):
                say(shlex.join(words))
            continue
        say(f"{job.name}: {counted(options.num_processes, 'process', 'processes')}; logs in {place}")
        status = local.run(job, options, place)
        say(f"{job.name}: " + ("finished" if status == 0 else f"ended with status {status}; logs in {place}"))
        worst = worst or status
        if status >= 128:  # a signal, which is meant for all of them
            break
    return worst


def _submit(backend: Backend, words: Sequence[str]) -> None:
    say(f"$ {shlex.join(words)}")
    code = subprocess.run(words, check=False).returncode
    if code:
        raise UserError(f"{backend.tool} did not take the job (status {code}; its own words are above); the file is {words[-1]}")


def check_backend(name: str | None) -> str:
    """The name of a backend; raises `UserError` for another and for none."""
    if not name:
        raise UserError(f"--backend is missing; choose one of {', '.join(OPTIONS)}")
    if name not in OPTIONS:
        raise UserError(f"--backend={name} is unknown{nearest(name, OPTIONS)}")
    return name


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
