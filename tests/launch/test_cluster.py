"""Which job a process belongs to, by its flags and its environment."""

import socket
import time

import pytest

from lcx.core.errors import UserError
from lcx.launch import cluster
from lcx.launch.cluster import AUTO, OFF, Job, check_reachable, find_job

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[01-02]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


def test_a_laptop_is_alone():
    assert find_job(AUTO, None, None, {}) is None
    assert find_job(OFF, None, None, SLURM) is None


def test_an_explicit_job():
    job = find_job("10.0.0.2:8476", 4, 3, {})
    assert job is not None
    assert job.arguments() == {
        "coordinator_address": "10.0.0.2:8476", "num_processes": 4, "process_id": 3, "cluster_detection_method": "deactivate",
    }  # fmt: skip


def test_slurm():
    # The only task of a node has all of its GPUs, where JAX alone would give it one.
    job = find_job(AUTO, None, None, {**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert job == Job("Slurm", num_processes=2, local_device_ids=(0, 1, 2, 3), method="slurm")
    a_gpu_each = find_job(AUTO, None, None, {**SLURM, "SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    assert a_gpu_each == Job("Slurm", num_processes=8, method="slurm")
    # An interactive allocation has no step, and one task needs no job.
    assert find_job(AUTO, None, None, {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}) is None
    assert find_job(AUTO, None, None, {**SLURM, "SLURM_NTASKS": "1"}) is None


def test_mpi():
    size = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert find_job(AUTO, None, None, {**size, "OMPI_MCA_orte_hnp_uri": "1;tcp://10.0.0.1:5"}) == Job("Open MPI", method="ompi")
    assert find_job(AUTO, None, None, {"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_mpi_that_does_not_say_where(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--num_processes=2 --process_id=1"):
        find_job(AUTO, None, None, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})


def on_a_tpu(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])


def test_tpus(monkeypatch):
    gke = {"TPU_WORKER_HOSTNAMES": "a-0,a-1", "TPU_WORKER_ID": "0"}
    assert find_job(AUTO, None, None, gke) is None  # these variables alone make no TPU
    on_a_tpu(monkeypatch)
    assert find_job(AUTO, None, None, gke) == Job("GKE", method="gketpu")
    assert find_job(AUTO, None, None, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    slices = dict(zip(cluster.SLICE_VARIABLES, ("a-0", "2", "1"), strict=True))
    assert find_job(AUTO, None, None, {"TPU_WORKER_HOSTNAMES": "a-0", **slices}) == Job("GKE", method="gketpu")
    assert find_job(AUTO, None, None, {}) == Job("the TPU's metadata server", method="gcetpu")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MEGASCALE_COORDINATOR_ADDRESS": "gone:8080"}, "without MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID.*earlier job; unset"),
        (
            dict(zip(cluster.SLICE_VARIABLES, ("a", "2", "2"), strict=True)),
            "MEGASCALE_SLICE_ID=2 is not one of MEGASCALE_NUM_SLICES=2",
        ),
    ],
)
def test_variables_of_an_earlier_job(variables, sentence, monkeypatch):
    on_a_tpu(monkeypatch)
    with pytest.raises(UserError, match=sentence):
        find_job(AUTO, None, None, variables)


def test_an_explicit_job_and_slices():
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES=2 names a job of several TPU slices.*unset MEGASCALE_NUM_SLICES"):
        find_job("10.0.0.2:8476", 2, 0, {"MEGASCALE_NUM_SLICES": "2"})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((AUTO, 2, None), "--num_processes=2 belongs to --distributed=HOST:PORT, which is 'auto'"),
        ((OFF, None, 0), "--process_id=0 belongs to --distributed=HOST:PORT, which is 'off'"),
        (("10.0.0.2:8476", None, 0), "needs --num_processes"),
        (("10.0.0.2:8476", 2, None), "needs --process_id"),
        (("10.0.0.2:8476", 2, 2), "--process_id=2 is not one of --num_processes=2"),
        (("10.0.0.2:8476", 0, 0), "--num_processes=0 must be at least 1"),
        (("10.0.0.2", 2, 0), "--distributed=10.0.0.2 is not auto, off or the address"),
        (("here:99999", 2, 0), "--distributed=here:99999 is not"),
        (("atuo", 2, 0), "--distributed=atuo is not auto, off"),
    ],
)
def test_wrong_flags(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        find_job(*flags, {})


def test_nobody_at_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(UserError, match=rf"process 1 cannot reach the coordinator at 127.0.0.1:{port} .*for 0.5 s"):
            check_reachable(f"127.0.0.1:{port}", 1, 0.5)
        assert time.monotonic() - begun < 2


def test_a_port_that_is_in_use():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used .*give another"):
            check_reachable(f"127.0.0.1:{taken.getsockname()[1]}", 0, 0.3)
        check_reachable(f"127.0.0.1:{taken.getsockname()[1]}", 1, 0.3)
