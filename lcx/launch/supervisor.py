"""A small process around the one that computes: it says why that ended, ends it if it has stopped, and may start it again.

It loads neither JAX nor the model, and hears from the other one over a pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from lcx.core import exits, host
from lcx.core.console import print_error, say
from lcx.core.processes import PIPE, supervised

ATTEMPT = "LCX_ATTEMPT"
"""Environment variable of a supervised process: how often it has been started again."""

JOINING = "the start of all processes"
"""What a process says it is doing until it has met the others; it gives no other sign of life before."""

PATIENCE = 2.0
"""How many times as long as the others' patience with a silent process its own supervisor waits before it kills it."""


@dataclasses.dataclass
class End:
    """How a process ended: its status, why if it said so itself, and what it was doing."""

    code: int
    reason: str | None
    at: str

    @property
    def restart(self) -> bool:
        """Whether starting it again may help."""
        return self.code == exits.RESTART

    def __str__(self) -> str:
        return self.reason or f"it ended with status {self.code} at '{self.at}'"


def pulse() -> int | None:
    """The supervised process's end of the pipe."""
    return int(os.environ[PIPE]) if supervised() else None


def end_with_supervisor() -> None:
    """On Linux, have this process asked to save and end if its supervisor is killed."""
    if supervised():
        host.end_with_parent(signal.SIGTERM)


def supervise(command: Sequence[str], restarts: int, silence: float, environment: Mapping[str, str] = os.environ) -> int:
    """Run a command to its end, again up to `restarts` times while it is lost to something that this may cure; returns its status.

    `silence`: seconds without a sign of life after which the other processes of its job have given it up.
    """
    for attempt in range(restarts + 1):
        end = _run(command, {**environment, ATTEMPT: str(attempt)}, silence)
        if not end.restart:
            return end.code
        if attempt < restarts:
            pause = min(30.0, 2.0**attempt)
            say(f"starting again ({attempt + 1} of {restarts}) in {pause:g} s, from the last checkpoint", stderr=True)
            time.sleep(pause)
    return end.code


def _run(command: Sequence[str], environment: Mapping[str, str], silence: float) -> End:
    ear, mouth = os.pipe()
    process = subprocess.Popen(command, env={**environment, PIPE: str(mouth)}, pass_fds=[mouth], process_group=0)
    os.close(mouth)
    with _passing_on(process), os.fdopen(ear, "rb", buffering=0) as pipe:
        at, said, killed = _listen(process, pipe, silence)
        code = process.wait()
    if said is not None:
        # What comes after that is JAX's own leave-taking, which may fail where another process is gone already.
        return End(*said, at)
    if killed:
        text = f"it gave no sign of life for {PATIENCE * silence:g} s and was killed; it was last at '{at}'"
    elif code < 0:
        number = -code
        name = host.signal_name(number)
        if number in (signal.SIGTERM, signal.SIGINT):
            return End(128 + number, f"it was ended by {name} at '{at}'", at)
        text = f"it was ended by {name}{_WHY.get(number, '')}; it was last at '{at}'"
    elif code in (exits.DONE, exits.INTERRUPTED, exits.PREEMPTED):
        return End(code, None, at)
    elif at == _BEFORE:
        return End(code, None, at)  # it has said what is wrong with its flags
    else:
        text = f"it was ended by JAX's distributed service at '{at}': another process, or process 0, was lost"
    print_error(f"the process that computes here is gone: {text}")
    return End(exits.RESTART, text, at)


_BEFORE = "its start"
_WHY: dict[int, str] = {signal.SIGKILL: ", perhaps for want of memory", signal.SIGABRT: ", as JAX does when process 0 is lost"}


def _listen(process: subprocess.Popen, pipe: IO[bytes], silence: float) -> tuple[str, tuple[int, str] | None, bool]:
    """What it said it was doing last, its status and why it ended if it said so, and whether it had to be killed."""
    at, said, heard, begun, rest = _BEFORE, None, time.monotonic(), False, b""
    while True:
        ended = process.poll() is not None
        if select.select([pipe], [], [], 0 if ended else 0.5)[0]:
            piece = pipe.read(65536)
            if not piece:
                return at, said, False
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                kind, _, text = line.decode(errors="replace").partition(" ")
                if kind == "end":
                    number, _, reason = text.partition(" ")
                    said = int(number), reason
                else:
                    at, begun = text, begun or kind == "at"
            heard = time.monotonic()
        elif ended:
            return at, said, False
        elif begun and said is None and time.monotonic() - heard > PATIENCE * silence:
            process.kill()
            return at, None, True


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[None]:
    """SIGTERM and Ctrl-C go on to the process, which is not in the terminal's group."""
    before = {
        number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
