"""Heartbeats: every process tells process 0 that it lives and what it does, and hears from it when the job has to end, and why.

Only intervals of a process's own clock are compared, so hosts' clocks may differ. The threads here never wait for the main one,
which may be inside a program that waits for a lost process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from typing import Any

from lcx.core import exits, processes
from lcx.core.console import print_error

PULSES, ENDS, VERDICT = (f"{processes.KEY}/{name}" for name in ("pulse", "end", "verdict"))

FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the job ends, and with which status."""

    reason: str
    code: int


@dataclasses.dataclass
class Seen:
    """The last pulse of a process, and when it and its number of moves were first seen (`time.monotonic()`)."""

    beat: int
    moves: int
    at: str
    beaten: float
    moved: float


class Rolls:
    """What process 0 knows of all processes."""

    def __init__(self, count: int, silence: float, hang: float):
        now = time.monotonic()
        self._seen = {process: Seen(-1, -1, "starting", now, now) for process in range(count)}
        self._silence, self._hang = silence, hang

    def hear(self, process: int, beat: int, moves: int, at: str) -> None:
        """Note a pulse."""
        seen, now = self._seen[process], time.monotonic()
        if beat != seen.beat:
            seen.beat, seen.beaten = beat, now
        if moves != seen.moves:
            seen.moves, seen.moved, seen.at = moves, now, at

    def judge(self) -> Verdict | None:
        """Whether a process is lost, or hangs."""
        now = time.monotonic()
        for process, seen in self._seen.items():
            if now - seen.beaten > self._silence:
                return silent(process, now - seen.beaten, seen.at)
        working = {process: seen for process, seen in self._seen.items() if seen.at != FINISHED}
        if not working or all(now - seen.moved <= self._hang for seen in working.values()):
            return None
        last, seen = min(working.items(), key=lambda item: item[1].moves)
        others = sorted({other.at for other in working.values() if other.moves > seen.moves})
        if now - seen.moved <= self._hang:
            return None
        if others:
            text = (
                f"{processes.named(last)} hangs: for {self._hang:g} s it has been at '{seen.at}', the others wait at '{others[-1]}'"
            )
        else:
            text = f"all processes hang: for {self._hang:g} s they have been at '{seen.at}'"
        return Verdict(f"{text}; all end here, and the same command goes on from the last checkpoint", exits.RESTART)


def silent(process: int, seconds: float, at: str) -> Verdict:
    """The verdict over a process that is not heard of."""
    return Verdict(
        f"{processes.named(process)} has not been heard of for {seconds:.0f} s: killed, stopped or cut off; it was last at '{at}'; "
        "all end here, and the same command goes on from the last checkpoint",
        exits.RESTART,
    )


class Heartbeat:
    """The heartbeat of this process, and its ear for the end of the job. `silence` and `hang` are seconds.

    `pulse` is a file descriptor to a supervisor on this host (`lcx.launch.supervisor`), or None.
    """

    def __init__(self, silence: float, hang: float, pulse: int | None = None):
        self._silence, self._pulse = silence, pulse
        self._store, self._self, self._count = processes.client(), processes.index(), processes.count()
        self._period = min(1.0, silence / 5)
        self._rolls = Rolls(self._count, silence, hang)
        self._contact, self._beat, self._first = time.monotonic(), 0, Seen(-1, -1, "starting", time.monotonic(), 0.0)
        self._stopped, self._heard = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._own = False
        self._threads = [threading.Thread(target=run, daemon=True, name=run.__name__) for run in (self._beats, self._listens)]

    def start(self) -> None:
        """Begin to beat and to listen."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until every process has finished, still listening; then stop."""
        processes.doing(FINISHED)
        processes.meet(FINISHED, timeout=10**6)
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    def publish(self, reason: str, code: int) -> None:
        """Tell all others that this process ends, and why; process 0 waits until they can have heard it."""
        self._own = True
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"{ENDS}/{self._self}", json.dumps([code, reason]), allow_overwrite=True)
        if self._self == 0:
            self._say_verdict(Verdict(f"{processes.named(0)} ended: {reason}", code))

    def explained(self) -> Verdict | None:
        """Why a program failed in this process, if another process is the cause; waits as long as that can take to be known."""
        self._heard.wait(self._silence + 4 * self._period)
        return self._verdict

    def leave(self, verdict: Verdict) -> None:
        """End this process now, whatever its other threads wait for."""
        if not self._heard.is_set():
            self._verdict = verdict
            self._heard.set()
        tell(self._pulse, "end", f"{verdict.code} {verdict.reason}")
        print_error(f"{processes.named(self._self)}: {verdict.reason}")
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(verdict.code)

    def _beats(self) -> None:
        while not self._stopped.is_set():
            doing = processes.now_doing()
            self._beat += 1
            tell(self._pulse, "at", doing.what)
            try:
                self._store.key_value_set(
                    f"{PULSES}/{self._self}", json.dumps([self._beat, doing.moves, doing.what]), allow_overwrite=True
                )
                verdict = self._judge() if self._self == 0 else self._ask()
                self._contact = time.monotonic()
            except Exception:
                verdict = None  # not reached; `_listens` counts the seconds
            if verdict is not None and not self._own and not self._stopped.is_set():
                if self._self == 0:
                    self._say_verdict(verdict)
                self.leave(verdict)
            self._stopped.wait(self._period)

    def _listens(self) -> None:
        """Without the store: how long ago did process 0 answer, and beat?"""
        while not self._stopped.wait(self._period):
            since = min(self._contact, self._first.beaten)
            if self._self != 0 and not self._own and time.monotonic() - since > self._silence:
                self.leave(silent(0, time.monotonic() - since, self._first.at))

    def _ask(self) -> Verdict | None:
        """The verdict of process 0, if there is one, and its own pulse."""
        pulse = _get(self._store, f"{PULSES}/0")
        if pulse is not None:
            beat, _, at = json.loads(pulse)
            if beat != self._first.beat:
                self._first = Seen(beat, 0, at, time.monotonic(), 0.0)
        found = _get(self._store, VERDICT)
        return None if found is None else Verdict(*json.loads(found))

    def _judge(self) -> Verdict | None:
        for key, value in self._store.key_value_dir_get(ENDS):
            code, reason = json.loads(value)
            process = int(key.rpartition("/")[2])
            return Verdict(f"{processes.named(process)} ended: {reason}", code)
        for key, value in self._store.key_value_dir_get(PULSES):
            self._rolls.hear(int(key.rpartition("/")[2]), *json.loads(value))
        return self._rolls.judge()

    def _say_verdict(self, verdict: Verdict) -> None:
        """Tell the others, and give them the time to hear it: it is gone with this process."""
        with contextlib.suppress(Exception):
            self._store.key_value_set(VERDICT, json.dumps([verdict.reason, verdict.code]), allow_overwrite=True)
        time.sleep(3 * self._period)


def _get(store: Any, key: str) -> str | None:
    try:
        return store.key_value_try_get(key)
    except Exception as error:
        if "NOT_FOUND" in str(error).upper().replace(" ", "_"):
            return None
        raise


def tell(pulse: int | None, kind: str, text: str) -> None:
    """A line to the supervisor, if there is one."""
    if pulse is not None:
        with contextlib.suppress(OSError):
            os.write(pulse, f"{kind} {' '.join(text.split())}\n".encode()[:4000])
