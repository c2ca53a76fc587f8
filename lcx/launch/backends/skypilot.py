"""SkyPilot: a task's YAML for any cloud, Kubernetes included, started as a managed job that recovers from preemptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lcx.core import exits
from lcx.core.errors import UserError
from lcx.launch.job import BUCKETS, Backend, JobSpec, at_least, default_setup, plain_word, refuse_own_disks, refuse_sources
from lcx.launch.render import render

PORT = 8476
"""Where the first node answers the others."""


@dataclasses.dataclass(frozen=True)
class SkyPilot:
    """`nodes` nodes of `accelerators`, as H100:8 or tpu-v6e-8, on `infra`, as gcp/us-central1 or k8s; None: the cheapest."""

    nodes: int
    accelerators: str
    infra: str | None = None
    spot: bool = False
    num_slices: ClassVar[int] = 1

    def __post_init__(self) -> None:
        at_least("nodes", self.nodes, 1)
        plain_word("accelerators", self.accelerators)
        plain_word("infra", self.infra)

    @property
    def devices(self) -> int | None:
        """Accelerators of the job; None for TPUs, whose names count chips or cores."""
        count = self.accelerators.partition(":")[2] or "1"
        return self.nodes * int(count) if count.isdigit() and not self.is_tpu else None

    @property
    def is_tpu(self) -> bool:
        """Whether the accelerators are TPUs, whose hosts find each other by themselves."""
        return self.accelerators.startswith("tpu-")


def files(job: JobSpec, options: SkyPilot) -> dict[str, str]:
    """The task's YAML."""
    refuse_sources(job, "skypilot", BUCKETS, "gs://my-bucket:/mnt/bucket")
    refuse_own_disks(job, options.nodes, ends="the node")
    for name, where in job.secrets.items():
        if where != name:
            raise UserError(
                f"--secret={name}={where}: SkyPilot takes a secret from the environment of this shell under its own name; export "
                f"{name} and write --secret={name}={name}"
            )
    resources: dict[str, Any] = {"accelerators": options.accelerators, "use_spot": options.spot}
    resources |= {"infra": options.infra} if options.infra is not None else {}
    resources |= {"image_id": f"docker:{job.image}"} if job.image is not None else {}
    # SkyPilot recovers on these codes without end, and max_restarts_on_errors is for every status, 1 included. So it is left to the
    # run's own supervisor to start again after what is lost on nodes that stay, and to SkyPilot after preemptions.
    resources |= {"job_recovery": {"recover_on_exit_codes": [exits.PREEMPTED]}} if job.max_restarts else {}
    text = render(
        "skypilot.yaml.j2", job=job, options=options, resources=_indented(resources, 2),
        setup=job.setup or (None if job.image else default_setup("tpu" if options.is_tpu else "gpu")),
        words=["lcx", *job.words, f"--max_restarts={job.max_restarts}"], port=PORT,
    )  # fmt: skip
    return {f"{job.name}.sky.yaml": text}


def _indented(values: dict[str, Any], by: int) -> str:
    """A mapping as the lines of a YAML block."""
    lines = yaml.safe_dump(values, sort_keys=False, default_flow_style=False, width=1000).splitlines()
    return "\n".join(" " * by + line for line in lines)


def submit(job: JobSpec, options: SkyPilot, path: Path) -> list[str]:
    """`sky jobs launch`, which returns once the job is queued."""
    secrets = [word for name in job.secrets for word in ("--secret", name)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, *secrets, str(path)]


BACKEND = Backend("sky", SkyPilot, frozenset({"image", "mounts", "env", "secrets", "setup"}), files, submit)
