"""The processes of one job on this machine: started together, told apart in their output, ended together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, ClassVar

from lcx.core import exits, host
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.launch.job import JobSpec, at_least

ALONE, GRACE = 10.0, 30.0
"""Seconds that the other processes have to end in by themselves once one has failed, and then after a SIGTERM."""

EXAMPLE_PORT = 8476
"""Shown where nothing is started, and so no port is chosen."""

COUNTED = b"[Gloo] Rank "
"""How the lines begin in which Gloo, which carries data between processes on CPUs, counts its connections, many times a run."""

LOOK = 0.05
"""Seconds between two looks at the processes."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """`num_processes` processes of `host_devices` CPU devices each (or of the machine's accelerators), which meet at `port`."""

    num_processes: int = 1
    host_devices: int = 1
    port: int | None = None
    num_slices: ClassVar[int] = 1

    @property
    def devices(self) -> int | None:
        """Devices of all processes; None where this machine has accelerators, which are counted when JAX starts."""
        return None if host.has_accelerators() else self.num_processes * self.host_devices

    def __post_init__(self) -> None:
        at_least("num_processes", self.num_processes, 1)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UserError(f"--port={self.port} is not a port; give 1 to 65535, or leave it out for a free one")


def commands(job: JobSpec, options: Processes, port: int) -> list[list[str]]:
    """The command line of each process."""
    start = [sys.executable, "-m", "lcx.cli", *job.words]
    devices = [f"--host_devices={options.host_devices}"] * (options.host_devices > 1)
    meet = [f"--distributed=127.0.0.1:{port}", f"--num_processes={options.num_processes}"]
    return [[*start, *devices, *meet, f"--process_id={i}"] for i in range(options.num_processes)]


def run(job: JobSpec, options: Processes, folder: Path) -> int:
    """Run the job until all its processes have ended, at most `max_restarts` times again; returns its exit status.

    What process I says is shown behind `[I]` and kept in `folder/process_I.log`. When one fails the others are ended, and its
    status is the job's; 128 plus the number for one that a signal killed. Ctrl-C and SIGTERM are passed on, so that the run saves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for tries in range(job.max_restarts + 1):
        status, stopped = run_all(commands(job, options, options.port or free_port()), folder)
        if stopped or status in (exits.DONE, exits.WRONG) or tries == job.max_restarts:
            break
        say(f"{job.name}: ended with status {status}; starting again ({tries + 1} of at most {job.max_restarts})")
    return status


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_all(lines: Sequence[Sequence[str]], folder: Path) -> tuple[int, bool]:
    """Run command lines at once, until all have ended: their status (see `run`), and whether a signal asked for their end."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XLA_FLAGS": _without_devices(os.environ.get("XLA_FLAGS", ""))}
    with contextlib.ExitStack() as open_files:
        started, readers = [], []
        lock = threading.Lock()
        with _passing_on(started) as received:
            for i, words in enumerate(lines):
                log = open_files.enter_context((folder / f"process_{i}.log").open("ab"))
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
                started.append(process)
                reader = threading.Thread(target=_copy, args=(process.stdout, log, f"[{i}] " if len(lines) > 1 else "", lock))
                reader.start()
                readers.append(reader)
            try:
                status = _watch(started)
            finally:
                _end(started)
                for reader in readers:
                    reader.join()
        return status, bool(received)


def _watch(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes; 0 if all ended well, else the status of the first that did not, soon after which it returns."""
    failed: int | None = None
    since = 0.0
    while True:
        codes = [process.poll() for process in started]
        bad = next((i for i, code in enumerate(codes) if code not in (None, 0)), None)
        if failed is None and bad is not None:
            failed, since = _status(codes[bad]), time.monotonic()
            if len(started) > 1 and None in codes:
                say(f"process {bad} ended with status {failed}; ending the others")
        if None not in codes:
            return failed or 0
        if failed is not None and time.monotonic() - since > ALONE:
            return failed
        time.sleep(LOOK)


def _status(code: int | None) -> int:
    return 128 - code if code is not None and code < 0 else code or 0


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: by SIGTERM, and after the time of grace by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [process for process in started if process.poll() is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


@contextlib.contextmanager
def _passing_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """While entered, Ctrl-C and SIGTERM go to the processes, which save and end; yields the signals that came."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        received.append(number)
        for process in started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(source: IO[bytes] | None, log: IO[bytes], prefix: str, lock: threading.Lock) -> None:
    """Copy lines to a log and, behind the prefix, to standard output; what a library counts there goes to the log alone."""
    for line in source or ():
        log.write(line)
        log.flush()
        if line.startswith(COUNTED):
            continue
        with lock:
            sys.stdout.write(prefix + line.decode(errors="replace"))
            sys.stdout.flush()


def _without_devices(flags: str) -> str:
    """XLA's flags without the number of host devices, which each process is told by its own flag."""
    return re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip()
