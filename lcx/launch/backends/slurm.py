"""Slurm: an sbatch script whose job goes back into the queue after a preemption and at its time limit."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import ClassVar

from lcx.core.errors import UserError
from lcx.launch.job import RETRY_STATUSES, Backend, JobSpec, at_least, plain_word, refuse_own_disks, refuse_sources
from lcx.launch.render import render

SECONDS_TO_SAVE = 120
"""How long before its time limit a run is told to save."""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """`nodes`, each with one process over `gpus_per_node` GPUs and `cpus_per_task` cores; the rest as sbatch's own options."""

    nodes: int
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    num_slices: ClassVar[int] = 1

    @property
    def devices(self) -> int | None:
        """GPUs of the job; None without any."""
        return None if self.gpus_per_node is None else self.nodes * self.gpus_per_node

    def __post_init__(self) -> None:
        for flag in ("nodes", "gpus_per_node", "cpus_per_task"):
            at_least(flag, getattr(self, flag), 1)
        plain_word("partition", self.partition)
        plain_word("account", self.account)
        if self.time is not None and not re.fullmatch(r"\d+|(\d+-)?\d+(:\d{1,2}){0,2}", self.time):
            raise UserError(f"--time={self.time} is no time limit; write minutes, H:MM:SS or D-HH:MM:SS, as in --time=12:00:00")


def files(job: JobSpec, options: Slurm) -> dict[str, str]:
    """The sbatch script."""
    refuse_sources(job, "slurm", ("/",), "/scratch/me:/scratch")
    if job.image is not None:
        refuse_own_disks(job, options.nodes, ends="the container", mount="/scratch/me:/scratch")
    elif job.mounts:
        raise UserError("--mount is for a container; without --image a job of Slurm sees the cluster's file systems as they are")
    for secret, place in job.secrets.items():
        if not place.startswith("/"):
            raise UserError(f"--secret={secret}={place} must name a file that only you can read, by its whole path")
    command = ["lcx"] if job.image is not None else [sys.executable, "-m", "lcx.cli"]
    text = render(
        "slurm.sbatch.j2", job=job, options=options, words=[*command, *job.words, "--distributed=auto"],
        folder=os.getcwd(), retry=RETRY_STATUSES, seconds=SECONDS_TO_SAVE,
        container_mounts=",".join(f"{mount.source}:{mount.target}" for mount in job.mounts),
    )  # fmt: skip
    return {f"{job.name}.sbatch": text}


def submit(job: JobSpec, options: Slurm, path: Path) -> list[str]:
    """`sbatch` with the script; what the job prints lies beside it."""
    # On the command line, where sbatch expands %j; a folder with a percent sign would be taken for a pattern in a directive.
    log = str(path.parent.absolute()).replace("%", "%%")
    return ["sbatch", f"--output={log}/%x-%j.log", str(path)]


BACKEND = Backend("sbatch", Slurm, frozenset({"image", "mounts", "env", "secrets", "setup"}), files, submit)
