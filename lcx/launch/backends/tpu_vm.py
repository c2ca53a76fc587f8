"""TPU VMs: a script over gcloud that asks for the slices, readies their hosts, runs, and gives them back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lcx.core.errors import UserError
from lcx.launch.job import RETRY_STATUSES, Backend, JobSpec, at_least, default_setup, plain_word, refuse_own_disks, refuse_sources
from lcx.launch.render import render
from lcx.launch.tpu import Slice


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """`num_slices` slices of a TPU kind and topology in a zone of a project, `spot` or `reserved` ones or on demand."""

    tpu: str
    topology: str
    zone: str
    project: str
    num_slices: int = 1
    spot: bool = False
    reserved: bool = False
    runtime_version: str | None = None
    service_account: str | None = None

    @property
    def devices(self) -> int:
        """Devices of all slices."""
        return self.num_slices * Slice(self.tpu, self.topology).devices

    def __post_init__(self) -> None:
        at_least("num_slices", self.num_slices, 1)
        for flag in ("zone", "project", "runtime_version", "service_account"):
            plain_word(flag, getattr(self, flag))
        if self.spot and self.reserved:
            raise UserError("--spot and --reserved exclude each other; give one of them")


def files(job: JobSpec, options: TpuVm) -> dict[str, str]:
    """The script; without arguments it starts or resumes the job, with `delete` it gives the slices back."""
    place = Slice(options.tpu, options.topology)
    refuse_sources(job, "tpu_vm", ("gs://",), "gs://my-bucket:/mnt/bucket")
    refuse_own_disks(job, place.hosts * options.num_slices, ends=None if job.image is None else "the container")
    for name, where in job.secrets.items():
        if not re.fullmatch(r"projects/[^/\s]+/secrets/[^/\s]+/versions/[^/\s]+", where):
            raise UserError(
                f"--secret={name}={where} must name a version in Secret Manager, as in "
                f"--secret={name}=projects/my-project/secrets/my-secret/versions/latest"
            )
    create = {
        "accelerator-type": place.accelerator_type,
        "runtime-version": options.runtime_version or place.generation.runtime,
        "service-account": options.service_account,
    }
    several = options.num_slices > 1
    nodes = [f"{job.name}-{i}" for i in range(options.num_slices)] if several else [job.name]
    names = {"node-count": str(options.num_slices), "node-prefix": job.name} if several else {"node-id": job.name}
    kinds = [f"--{kind}" for kind in ("spot", "reserved") if getattr(options, kind)]
    text = render(
        "tpu_vm.sh.j2", job=job, options=options, place=place, nodes=nodes, retry=RETRY_STATUSES,
        create=[f"--{name}={value}" for name, value in {**names, **create}.items() if value] + kinds,
        mounts=[_bucket(mount.source, mount.target) for mount in job.mounts],
        setup=None if job.image else job.setup or default_setup("tpu"), words=["lcx", *job.words, "--distributed=auto"],
    )  # fmt: skip
    return {f"{job.name}.sh": text}


def _bucket(source: str, target: str) -> tuple[list[str], str]:
    """Words of gcsfuse for a bucket or a folder of one, and where it is mounted."""
    bucket, _, only = source.removeprefix("gs://").partition("/")
    return ["gcsfuse", "--implicit-dirs", *[f"--only-dir={only.rstrip('/')}"] * bool(only), bucket, target], target


def submit(job: JobSpec, options: TpuVm, path: Path) -> list[str]:
    """The script itself, which stays until the run has ended."""
    return ["bash", str(path)]


BACKEND = Backend("gcloud", TpuVm, frozenset({"image", "mounts", "env", "secrets", "setup"}), files, submit)
