"""One point of a sweep: a process of its own, and what is kept of it in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.host import signal_name
from lcx.report.sweep_plots import PointResult

Collect = Callable[[pathlib.Path], dict[str, Any]]
"""A finished point's folder -> its numbers."""

_COMPILE_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


@dataclasses.dataclass(frozen=True)
class Task:
    """A point to run: its name, what sets it apart, its folder, its command line, its numbers' reader, the seconds that it has."""

    name: str
    overrides: dict[str, Any]
    folder: pathlib.Path
    argv: list[str]
    collect: Collect
    timeout: float | None


def run_point(task: Task) -> PointResult:
    """Run a point and record what came of it."""
    task.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    reason = _execute(task.argv, task.folder / "log.txt", task.timeout)
    return _record(task, reason, started)


def look_at(task: Task) -> PointResult:
    """What a point has left that is run elsewhere."""
    if not (task.folder / "report.html").exists():
        return PointResult(task.name, dict(task.overrides), "failed", "not finished: it has no report yet")
    return _record(task, "", time.perf_counter())


def _record(task: Task, reason: str, started: float) -> PointResult:
    """Keep the result of a point in its folder; `reason` says why it failed, `started` is by `time.perf_counter`."""
    numbers: dict[str, Any] = {}
    if not reason:
        try:
            numbers = task.collect(task.folder)
        except (UserError, OSError, ValueError, KeyError) as error:
            reason = f"it ended well but its results cannot be read: {error}"
    seconds = time.perf_counter() - started
    outcome = PointResult(task.name, dict(task.overrides), "failed" if reason else "finished", reason, seconds, numbers)
    text = json.dumps(configs.plain(outcome), indent=1) + "\n"
    write_atomically(task.folder / ("failed.json" if reason else "result.json"), text)
    if not reason:
        (task.folder / "failed.json").unlink(missing_ok=True)
    return outcome


def _execute(argv: list[str], log: pathlib.Path, timeout: float | None) -> str:
    """Run a command with its output in `log`; empty when it exits with 0, else the reason why it did not.

    Points keep what they compile in the sweep's folder: those that differ in a theta alone share one program.
    """
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(log.absolute().parents[2] / "compiled"), _COMPILE_SECONDS: "0.3"}
    environment = {**compiled, **os.environ}
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
        except OSError as error:
            return f"it could not be started: {error}"
        try:
            with _passing_on(process):
                code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"it took longer than {timeout:g} s"
        except (KeyboardInterrupt, SystemExit):
            # The terminal has sent the interrupt to the point too, which saves a checkpoint; leave it the time to.
            process.wait()
            raise
    if code < 0:
        number = -code
        return f"killed by {signal_name(number)}" + (" (out of memory, perhaps)" if number == signal.SIGKILL else "")
    return f"exit status {code}: {_last_line(log)}" if code else ""


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[None]:
    """While the point runs, a SIGTERM to the sweep ends the point too, so that it does not write during the next one."""

    def end(number: int, _: object) -> None:
        process.terminate()
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finished(folder: pathlib.Path, name: str, overrides: dict[str, Any]) -> PointResult | None:
    """The recorded result of a point that is finished, if there is one."""
    try:
        values = json.loads((folder / "result.json").read_text())
        result = configs.build(PointResult, values, str(folder / "result.json"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if configs.plain(result.overrides) != configs.plain(overrides):
        raise UserError(
            f"{folder} holds a point with overrides that differ from those of {name!r}; use another workdir for the changed sweep"
        )
    return result


def _last_line(log: pathlib.Path) -> str:
    lines = [line.strip() for line in log.read_bytes()[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
