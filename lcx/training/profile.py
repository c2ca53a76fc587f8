"""A trace of chosen steps for xprof: what every device did, and when."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax

from lcx.core.console import say
from lcx.core.errors import UserError

FOLDER = "profile"
"""Directory of a workdir that holds its traces."""


@dataclasses.dataclass(frozen=True)
class ProfileSteps:
    """The steps to trace, `first` to `last`, both included, numbered as in `metrics.jsonl`: from 1, through all stages.

    `processes` of the job trace; None: all of them.
    """

    first: int
    last: int
    processes: tuple[int, ...] | None = (0,)

    def check(self, done: int, total: int) -> None:
        """Raises `UserError` if a run that has done `done` of `total` steps cannot trace them."""
        if self.last > total:
            raise UserError(f"--profile={self.first}:{self.last} goes beyond the last step of the run, {total}; name earlier steps")
        if self.first <= done:
            raise UserError(
                f"--profile={self.first}:{self.last} names steps that are done, for the run is at step {done}; name later steps, "
                "or another --workdir to begin anew"
            )
        missing = [number for number in self.processes or () if number >= jax.process_count()]
        if missing:
            raise UserError(
                f"--profile names process {missing[0]}, but the job has {jax.process_count()}, counted from 0; name one of these"
            )

    @property
    def here(self) -> bool:
        """Whether this process traces."""
        return self.processes is None or jax.process_index() in self.processes


def profile_steps(text: str | None) -> ProfileSteps | None:
    """What `--profile=FIRST:LAST` or `--profile=FIRST:LAST@PROCESSES` says, None without it; raises `UserError` for anything else.

    PROCESSES are numbers between commas, or all.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15}):(\d{1,15})(?:@(all|\d{1,9}(?:,\d{1,9})*))?", text)
    if found is None:
        raise UserError(
            f"--profile={text} is not a range of steps; give the first and the last, as in --profile=10:13, and the processes "
            "that trace behind an @, as in --profile=10:13@0,3 or --profile=10:13@all"
        )
    first, last, processes = int(found[1]), int(found[2]), found[3] or "0"
    if not 1 <= first <= last:
        raise UserError(f"--profile={text} holds no step; the first step is 1, and the last may not come before the first")
    return ProfileSteps(first, last, None if processes == "all" else tuple(sorted({int(one) for one in processes.split(",")})))


class Profiler:
    """Traces the chosen steps into `workdir/profile`; without steps, or in a process that is not chosen, it does nothing.

    Process I of several has `profile/process_I` to itself: two of one host would write to the same file. A context manager that
    ends an open trace.
    """

    def __init__(self, steps: ProfileSteps | None, workdir: Path):
        self._chosen, self._steps = steps, steps if steps is not None and steps.here else None
        single = jax.process_count() == 1
        self._folder = workdir / FOLDER / ("" if single else f"process_{jax.process_index()}")
        self._open = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._stop()

    def check(self, done: int, total: int) -> None:
        """Raises `UserError` if a run that has done `done` of `total` steps cannot trace the steps."""
        if self._chosen is not None:
            self._chosen.check(done, total)

    def begin(self, step: int, flush: Callable[[], None]) -> contextlib.AbstractContextManager[object]:
        """What to enter around step `step`; starts the trace before the first one, after `flush` has waited for earlier work."""
        if self._steps is None:
            return contextlib.nullcontext()
        if step == self._steps.first:
            flush()
            if self._open:  # the monitor has sent the run back from within the steps
                self._stop()
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, flush: Callable[[], None]) -> None:
        """Ends the trace behind the last step, once `flush` has waited for it."""
        if self._open and self._steps is not None and step == self._steps.last:
            flush()
            self._stop()
            steps = f"steps {self._steps.first} to {self._steps.last}"
            say(f"profile: {steps} are in {self._folder}; to view them: pip install xprof, then xprof --logdir={self._folder}")

    def _stop(self) -> None:
        self._open = False
        jax.profiler.stop_trace()
