"""Which job a process belongs to: as it was told, or as its scheduler's environment variables say. Nothing is asked over a network.

`--distributed=auto` starts JAX's distributed service where one of these schedulers has started more than one process.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from lcx.core.errors import UserError

AUTO, OFF = "auto", "off"

SLICE_VARIABLES = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
"""What tells the processes of several TPU slices of each other; all of them, or none."""


@dataclasses.dataclass(frozen=True)
class Job:
    """How this process joins its job: what `jax.distributed.initialize` is called with. None is left to JAX to detect.

    `scheduler` is who started it, in words.
    """

    scheduler: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    method: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Those of them that are known, by JAX's names."""
        given = {
            "coordinator_address": self.coordinator,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
            "local_device_ids": None if self.local_device_ids is None else list(self.local_device_ids),
            "cluster_detection_method": self.method,
        }
        return {name: value for name, value in given.items() if value is not None}


def find_job(
    asked: str, num_processes: int | None, process_id: int | None, environment: Mapping[str, str] = os.environ
) -> Job | None:
    """The job that `--distributed` and its companions name, or that the environment does; None for a process alone.

    Raises `UserError` for flags that do not belong together, and for an environment that names a job only in part.
    """
    if asked in (AUTO, OFF):
        for name, value in (("num_processes", num_processes), ("process_id", process_id)):
            if value is not None:
                raise UserError(f"--{name}={value} belongs to --distributed=HOST:PORT, which is {asked!r}; add the address")
        return None if asked == OFF else _detected(environment)
    host, port = split_address(asked)
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        if value is None:
            raise UserError(f"--distributed={asked} needs --{name}; give it, or --distributed=auto where a scheduler starts lcx")
    assert num_processes is not None and process_id is not None
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1, the number of processes of the whole job")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} is not one of --num_processes={num_processes}; processes count from 0")
    _check_slices(environment, several_slices=False)
    return Job("the command line", f"{host}:{port}", num_processes, process_id, method="deactivate")


def split_address(address: str) -> tuple[str, int]:
    """Host and port; raises `UserError` for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or any(c.isspace() for c in host):
        raise UserError(f"--distributed={address} is not auto, off or the address HOST:PORT of process 0, such as 10.0.0.2:8476")
    return host, int(port)


def _detected(environment: Mapping[str, str]) -> Job | None:
    for find in (_slurm, _open_mpi, _tpu, _kubernetes):
        job = find(environment)
        if job is not None:
            return job
    return None


def _slurm(environment: Mapping[str, str]) -> Job | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in needed):
        return None
    # srun counts the tasks of a step, which may be fewer than its job's.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]))
    if tasks == 1:
        return None
    a_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    devices = None
    if a_node.split("(")[0] == "1":
        # JAX would give a task one GPU; the only one on a node gets all of them.
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        number = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
        devices = tuple(range(max(1, number)))
    return Job("Slurm", num_processes=tasks, local_device_ids=devices, method="slurm")


def _open_mpi(environment: Mapping[str, str]) -> Job | None:
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) == 1:
        return None
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return Job("Open MPI", method="ompi")
    if importlib.util.find_spec("mpi4py") is not None:
        return Job("MPI", method="mpi4py")
    rank, size = environment.get("OMPI_COMM_WORLD_RANK", "N"), environment["OMPI_COMM_WORLD_SIZE"]
    raise UserError(
        f"MPI started {size} processes, and this version of it does not say where the first one runs; install mpi4py, or give "
        f"--distributed=HOST:PORT --num_processes={size} --process_id={rank}"
    )


def _tpu(environment: Mapping[str, str]) -> Job | None:
    if importlib.util.find_spec("libtpu") is None or not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        return None
    slices = _check_slices(environment, several_slices=True)
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if workers is not None:
        return Job("GKE", method="gketpu") if slices > 1 or "," in workers else None
    # A virtual machine of a slice asks its own metadata server who the others are; this machine is one, as its chips show.
    return None if environment.get("TPU_SKIP_MDS_QUERY") else Job("the TPU's metadata server", method="gcetpu")


def _kubernetes(environment: Mapping[str, str]) -> Job | None:
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        return None
    return Job("Kubernetes")


def _check_slices(environment: Mapping[str, str], several_slices: bool) -> int:
    """The number of slices that the environment names; raises `UserError` if its variables cannot all be of this job."""
    found = {name: environment[name] for name in SLICE_VARIABLES if environment.get(name)}
    unset = f"unset {', '.join(sorted(name for name in environment if name.startswith('MEGASCALE_')))}"
    if not found:
        return 1
    if not several_slices:
        first = next(iter(found))
        raise UserError(
            f"{first}={found[first]} names a job of several TPU slices, and --distributed names another; it may be left over from "
            f"an earlier job: {unset}, or use --distributed=auto"
        )
    if missing := [name for name in SLICE_VARIABLES if name not in found]:
        raise UserError(
            f"{', '.join(found)} are set without {', '.join(missing)}, so they are of an earlier job; {unset}, or set all"
        )
    count, number = found["MEGASCALE_NUM_SLICES"], found["MEGASCALE_SLICE_ID"]
    if not count.isdecimal() or not number.isdecimal() or int(number) >= int(count):
        raise UserError(f"MEGASCALE_SLICE_ID={number} is not one of MEGASCALE_NUM_SLICES={count} slices; {unset}, or correct them")
    return int(count)


def check_reachable(address: str, process: int, timeout: float) -> None:
    """Wait until the coordinator answers, or its port is free if this is process 0; raises `UserError` after `timeout` seconds."""
    host, port = split_address(address)
    until, failure = time.monotonic() + timeout, "no answer"
    while True:
        try:
            if process == 0:
                _check_free(host, port)
            else:
                socket.create_connection((host.strip("[]"), port), timeout=5).close()
            return
        except OSError as error:
            failure = error.strerror or str(error)
        if time.monotonic() >= until:
            break
        time.sleep(0.25)
    if process == 0:
        raise UserError(f"port {port} of --distributed={address} cannot be used ({failure}); end what uses it, or give another")
    raise UserError(
        f"process {process} cannot reach the coordinator at {address} ({failure}, for {timeout:g} s); is process 0 running there, "
        "and is the port open?"
    )


def _check_free(host: str, port: int) -> None:
    # Without SO_REUSEPORT, with which two coordinators would share a port.
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(("127.0.0.1" if is_loopback(host) else "", port))


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own alone."""
    return host in ("localhost", "127.0.0.1", "[::1]", "::1")
