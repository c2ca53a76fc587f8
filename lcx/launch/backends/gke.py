"""GKE: a JobSet over slices of TPUs, one job a slice and one pod a host, as XPK makes them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from lcx.core import exits
from lcx.core.errors import UserError
from lcx.launch.job import Backend, JobSpec, at_least, plain_word, refuse_own_disks, refuse_sources
from lcx.launch.render import render
from lcx.launch.tpu import Slice


@dataclasses.dataclass(frozen=True)
class Gke:
    """`num_slices` slices of a TPU kind and topology, `spot` ones or not; `queue` is a local queue of Kueue."""

    tpu: str
    topology: str
    num_slices: int = 1
    spot: bool = False
    namespace: str = "default"
    queue: str | None = None
    service_account: str | None = None

    @property
    def devices(self) -> int:
        """Devices of all slices."""
        return self.num_slices * Slice(self.tpu, self.topology).devices

    def __post_init__(self) -> None:
        at_least("num_slices", self.num_slices, 1)
        for flag in ("namespace", "queue", "service_account"):
            plain_word(flag, getattr(self, flag))


def files(job: JobSpec, options: Gke) -> dict[str, str]:
    """The JobSet's YAML."""
    if job.image is None:
        raise UserError("--backend=gke needs --image, a container image with lcx in it, as in --image=HOST/PROJECT/lcx:1")
    place = Slice(options.tpu, options.topology)
    refuse_sources(job, "gke", ("gs://", "pvc/"), "gs://my-bucket:/mnt/bucket")
    refuse_own_disks(job, place.hosts * options.num_slices, ends="the pod")
    for name, where in job.secrets.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*/[A-Za-z0-9._-]+", where):
            raise UserError(
                f"--secret={name}={where} must name a secret of the cluster and a key in it, as in --secret={name}=wandb/key"
            )
    text = render(
        "jobset.yaml.j2", job=job, options=options, place=place, volumes=[_volume(i, job, options) for i in range(len(job.mounts))],
        secrets={name: where.split("/") for name, where in job.secrets.items()},
        env={name: _literal(value) for name, value in job.env.items()},
        command=["lcx", *map(_literal, job.words), "--distributed=auto"], user_error=exits.WRONG,
    )  # fmt: skip
    return {f"{job.name}.jobset.yaml": text}


def _literal(text: str) -> str:
    """A text that Kubernetes, which expands $(NAME) in commands and values, takes as it is."""
    return text.replace("$(", "$$(")


def _volume(index: int, job: JobSpec, options: Gke) -> dict[str, Any]:
    """A volume of a pod: a bucket by the driver of Cloud Storage, or a claim."""
    name, source = f"mount-{index}", job.mounts[index].source
    if source.startswith("pvc/"):
        return {"name": name, "persistentVolumeClaim": {"claimName": source.removeprefix("pvc/")}}
    bucket, _, only = source.removeprefix("gs://").partition("/")
    flags = ",".join(["implicit-dirs", *[f"only-dir={only.rstrip('/')}"] * bool(only)])
    attributes = {"bucketName": bucket, "mountOptions": flags}
    if options.service_account is not None:
        # A pod on the host's network acts as its node's account otherwise (gcs-fuse-csi-driver, docs/authentication.md).
        attributes["hostNetworkPodKSA"] = "true"
    return {"name": name, "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def submit(job: JobSpec, options: Gke, path: Path) -> list[str]:
    """`kubectl apply`, which leaves a JobSet of this name that is there as it is."""
    return ["kubectl", "apply", f"--filename={path}"]


BACKEND = Backend("kubectl", Gke, frozenset({"image", "mounts", "env", "secrets"}), files, submit)
