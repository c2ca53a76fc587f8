"""Commands and programs as jobs of several processes of this machine, which meet on loopback."""

import os
import re
import subprocess
import sys
from pathlib import Path

from lcx.launch.local import free_port
from tests.xla_flags import known

ROOT = Path(__file__).parents[2]


def environment(devices):
    """For a process with so many CPU devices that compiles as the tests do."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    if known("xla_cpu_collective_timeout_seconds"):
        flags += " --xla_cpu_collective_timeout_seconds=300"  # a busy machine may let one process wait for long
    found["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    return found


def lcx(words, count, folder, *, port=None, devices=2, only=None, programs=None, **flags):
    """Start `lcx` with the words in `count` processes, or in those of them in `only`, with output in `folder/<process>.log`."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for process in range(count) if only is None else only:
        job = {"distributed": f"127.0.0.1:{port}", "num_processes": count, "process_id": process, "host_devices": devices, **flags}
        command = [sys.executable, "-m", "lcx.cli", *map(str, words), *(f"--{flag}={value}" for flag, value in job.items())]
        with (folder / f"{process}.log").open("ab") as log:
            found = environment(1) | ({} if programs is None else {"JAX_COMPILATION_CACHE_DIR": str(programs)})
            started.append(subprocess.Popen(command, env=found, stdout=log, stderr=subprocess.STDOUT))
    return started


def program(path, count, folder, *words, devices=2):
    """Run a Python file in `count` processes, with port, number of processes and own number before the words; returns statuses."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for process in range(count):
        command = [sys.executable, str(path), str(port), str(count), str(process), *map(str, words)]
        with (folder / f"{process}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment(devices), stdout=log, stderr=subprocess.STDOUT))
    return ended(started)


def answers(code, *words):
    """What two processes print that run the Python `code`, with port and own number before the words."""
    port = free_port()
    found = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found.pop("XLA_FLAGS", None)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(rank), *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=found,
        )
        for rank in range(2)
    ]  # fmt: skip
    heard = [child.communicate(timeout=180) for child in children]
    assert [child.returncode for child in children] == [0, 0], [error[-3000:] for _, error in heard]
    return [out for out, _ in heard]


def ended(started, timeout=1200):
    """The statuses of processes; those that do not end in `timeout` seconds are killed."""
    try:
        return [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()


def said(folder, process):
    """What a process has printed."""
    return (folder / f"{process}.log").read_text(errors="replace")
