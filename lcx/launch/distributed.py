"""Join a job of several processes before anything else is done, be one of them, and leave it together.

`joined` is around a whole command. A process alone (`cluster.find_job`) is left as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from lcx.core import exits, processes
from lcx.core.console import friendly_errors, print_error, say, warn
from lcx.core.errors import UserError
from lcx.core.numbers import counted
from lcx.core.version import VERSION
from lcx.launch import supervisor
from lcx.launch.cluster import Job, check_reachable, is_loopback, split_address
from lcx.launch.heartbeat import Heartbeat, tell

CLOCK = 5.0
"""Seconds by which clocks may differ before that is said."""

_SINCE = "LCX_START_SINCE"
"""When this process first tried to join, for one that has to try anew."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds: for all processes to `start`, for one that gives no sign of life (`silence`), and for one that does not get on
    (`hang`)."""

    start: float = 300.0
    silence: float = 30.0
    hang: float = 1800.0


@contextlib.contextmanager
def joined(job: Job | None, patience: Patience, said: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Everything inside is done by all processes of `job` together; a process alone goes straight on.

    `said` gives what the command was told, which must be the same in all of them. An error in one process ends all, with its
    reason and status; the process ends here, whatever happens.
    """
    if job is None:
        yield
        return
    heartbeat: Heartbeat | None = None
    try:
        with friendly_errors():
            try:
                _start(job, patience)
            except UserError as error:
                print_error(str(error))
                _leave(None, str(error), exits.RESTART)
            heartbeat = Heartbeat(patience.silence, patience.hang, supervisor.pulse())
            heartbeat.start()
            _compare(said())
            with _terminable(), _one_voice(), _explained(heartbeat):
                yield
            _finish(heartbeat, exits.DONE)
        return
    except processes.AllStop as end:
        _finish(heartbeat, int(str(end.code)))
        raise
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else exits.WRONG
        # `friendly_errors` has printed the sentence; the context of its exit is the error.
        reason = str(end.__context__ or "") or {exits.PREEMPTED: "SIGTERM", exits.INTERRUPTED: "Ctrl-C"}.get(code, f"status {code}")
        _leave(heartbeat, reason, code)
    except BaseException as error:
        # A program fails when another process is lost; that one is the reason, not the text of the collective.
        verdict = None if heartbeat is None else heartbeat.explained()
        if heartbeat is not None and verdict is not None:
            heartbeat.leave(verdict)
        traceback.print_exc()
        _leave(heartbeat, f"{type(error).__name__}: {_short(error)}", exits.RESTART if _is_runtime(error) else exits.WRONG)


def _finish(heartbeat: Heartbeat | None, code: int) -> None:
    """Leave the job when all do."""
    import jax

    if heartbeat is not None:
        heartbeat.finish()
    tell(supervisor.pulse(), "end", f"{code} all have finished")
    jax.distributed.shutdown()


def _leave(heartbeat: Heartbeat | None, reason: str, code: int) -> NoReturn:
    """Tell the others and the supervisor, and end without the meeting at the end, to which they will not come."""
    if heartbeat is not None:
        heartbeat.publish(reason, code)
    tell(supervisor.pulse(), "end", f"{code} {reason}")
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _start(job: Job, patience: Patience) -> None:
    import jax

    # SIGTERM is lcx's: training sees to it that all stop after the same step.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPUs programs would run side by side, and the transfers of one be taken for another's.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    tell(supervisor.pulse(), "joining", supervisor.JOINING)
    since = float(os.environ.setdefault(_SINCE, repr(time.time())))
    left = max(1.0, patience.start - (time.time() - since))
    if job.coordinator is not None and job.process_id is not None:
        check_reachable(job.coordinator, job.process_id, min(left, 20.0) if job.process_id == 0 else left)
    arguments: dict[str, Any] = {
        **job.arguments(),
        # Longer than the patience of this process, which ends in a sentence; JAX would abort with the places of its code.
        "initialization_timeout": int(left) + 60,
        # Only for what the heartbeats of lcx do not find.
        "heartbeat_timeout_seconds": int(max(100, 4 * patience.silence)),
        "shutdown_timeout_seconds": 15,
    }
    if job.coordinator is not None and is_loopback(split_address(job.coordinator)[0]):
        arguments["coordinator_bind_address"] = job.coordinator
    with _limited(left, f"not all processes that {job.scheduler} names have started within {patience.start:g} s"):
        try:
            jax.distributed.initialize(**arguments)
        except Exception as error:
            _try_anew(error, since, patience)
            raise UserError(
                f"this process cannot join the job that {job.scheduler} names ({_short(error)}); were all processes started, with "
                "the same address and number of processes?"
            ) from error
        hosts = processes.exchange("host", socket.gethostname(), left)
        processes.name_hosts(hosts)
        # Takes what each process has of devices to all others.
        jax.devices()
    os.environ.pop(_SINCE, None)


def _try_anew(error: Exception, since: float, patience: Patience) -> None:
    """A coordinator of the job before, which has not noticed its end yet, refuses this process: start it anew until it is gone."""
    if time.time() - since < patience.start and processes.supervised() and os.environ.get(supervisor.ATTEMPT, "0") != "0":
        warn(f"the job before has not ended everywhere ({_short(error)}); trying again")
        time.sleep(2.0)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def _limited(seconds: float, sentence: str) -> Iterator[None]:
    """End the process with a sentence if the body takes longer: some libraries wait for ever for an address that is gone."""

    def end() -> None:
        stale = any(name.startswith("MEGASCALE_") for name in os.environ)
        print_error(
            f"{sentence}; start the others with the same address, or raise --initialization_timeout"
            + (". MEGASCALE_* variables of an earlier job do this, too" if stale else "")
        )
        tell(supervisor.pulse(), "end", f"{exits.RESTART} {sentence}")
        os._exit(exits.RESTART)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _compare(said: Mapping[str, Any]) -> None:
    """Raises `UserError` where the processes are not the same, before anything is compiled; clocks only bring a warning."""
    import jax
    import jaxlib.version

    versions = {"lcx": VERSION, "jax": jax.__version__, "jaxlib": jaxlib.version.__version__, "Python": platform.python_version()}
    processes.agree("versions", versions, "install the same on all hosts, as with constraints.txt")
    device = jax.local_devices()[0]
    there = {"the number of devices": jax.local_device_count(), "the kind of device": device.device_kind}
    processes.agree("devices", there, "start lcx on hosts of one kind, with all of their devices")
    processes.agree(
        "command", said, "give all the same command and the same config file, or --distributed=off for runs of their own"
    )
    processes.meet("clock")
    times = processes.exchange("clock", time.time())
    for process, there_is in enumerate(times):
        if abs(there_is - times[0]) > CLOCK:
            warn(
                f"the clock of {processes.named(process)} is {there_is - times[0]:+,.0f} s off that of {processes.named(0)}; only "
                "times in logs differ by that"
            )
    if processes.is_first():
        hosts = len({processes.named(i).partition(" on ")[2] for i in range(processes.count())})
        there = f"{counted(jax.device_count(), 'device')} ({device.device_kind})"
        say(f"{counted(processes.count(), 'process', 'processes')} on {counted(hosts, 'host')}, {there}", stderr=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the process by `SystemExit`, so that the others are told; training takes it over and saves first."""

    def end(number: int, _: object) -> None:
        raise SystemExit(exits.PREEMPTED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if callable(before) else signal.SIG_DFL)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """What goes to standard output comes from process 0; warnings and errors from every process."""
    if processes.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _explained(heartbeat: Heartbeat) -> Iterator[None]:
    """An error that comes from the loss of another process, as of a checkpoint that cannot be written, gives way to that reason."""
    try:
        yield
    except UserError as error:
        if _is_runtime(error) and (verdict := heartbeat.explained()) is not None:
            heartbeat.leave(verdict)
        raise


def _is_runtime(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is the machine's and not the program's."""
    import jax

    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"
