"""Where the time of a run goes: `goodput.jsonl` in its workdir, in the vocabulary of ml-goodput-measurement, and its sums.

A run's main thread is in one part at any time. A row has the seconds of each part since the row before, so that rows fill the time
without a gap: from the start of the process to its end, or to its last row if it was killed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lcx.training import metrics
from lcx.training.slow_steps import SlowStep

FILE = "goodput.jsonl"

INIT, PREPARATION, RESTORE = "accelerator_init", "training_preparation", "checkpoint_restore"
COMPILE, DATA, STEP, SAVE, EVALUATION = "program_startup", "data_loading", "step", "checkpoint_save", "evaluation"
REPORT, WASTED, RECOVERY = "report", "wasted_progress", "infrastructure_recovery"

PARTS = {
    STEP: "steps that the run kept",
    DATA: "waiting for batches",
    COMPILE: "compiling",
    SAVE: "saving checkpoints",
    EVALUATION: "probes and evaluations",
    REPORT: "writing the report",
    INIT: "starting the process, libraries and devices",
    PREPARATION: "preparing data, plans and parameters",
    RESTORE: "reading the checkpoint to resume from",
    WASTED: "steps that were lost to a restart or rolled back, done again",
    RECOVERY: "from the end of an interrupted process to the start of the next",
}
"""Part -> what it is. The first is goodput, the others are badput; the last two are found when rows are summed."""

ENDS = {"KeyboardInterrupt": "interrupted", "UserError": "error"}
"""What ends a process -> the word for it; any other end is `lost`, one without an exception `finished`."""

CLEAN = ("finished", "interrupted", "error")
"""Ways to end after which a person starts the run again whenever he likes: the time until then is not the run's."""


class Recorder:
    """Writes what the main thread of a run does; a context manager around all of it.

    `since` is when the process began, in seconds of the epoch (None: now). Until `keep` has named a workdir rows are only
    collected; a run that is refused leaves nothing.
    """

    def __init__(self, since: float | None = None):
        now = time.time()
        self._clock = now - time.perf_counter()
        self._before = now if since is None else min(since, now)
        self._part, self._spent = INIT, collections.Counter()
        self._path: Path | None = None
        self._active = True
        self._waiting: list[dict[str, Any]] = [{"event": "job_start", "time": self._before}]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        how = "finished" if kind is None else ENDS.get(kind.__name__, "lost")
        with contextlib.suppress(OSError):  # a full disk has been reported
            self._row("job_end", how=how)

    def keep(self, workdir: Path, active: bool = True) -> None:
        """Write rows to a workdir from now on, those so far included; none where `active` is false, as in all processes but one."""
        self._active = active
        if not active:
            self._waiting.clear()
            return
        path = workdir / FILE
        metrics.cut_partial_line(path)
        self._path = path
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            metrics.append(path, row)

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        """The time of the body is the `part`'s, except that of spans within it."""
        before = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(before)
            if part not in (DATA, STEP):
                self._row(part)

    def become(self, part: str) -> None:
        """The time from here on is the `part`'s, except that of spans."""
        self._switch(part)

    def step(self, step: int) -> None:
        """Step `step` of the run (from 1) is done."""
        self._row("step_end", step=step)

    def slow_step(self, found: SlowStep) -> None:
        """A step took much longer than others."""
        self._row("slow_step", **dataclasses.asdict(found))

    def goes_on_from(self, step: int) -> None:
        """The run goes on behind step `step`; what it did after that before, it does again."""
        self._row("goes_on_from", step=step)

    def _switch(self, part: str) -> None:
        now = self._clock + time.perf_counter()
        self._spent[self._part] += max(0.0, now - self._before)
        self._part, self._before = part, now

    def _row(self, event: str, **values: Any) -> None:
        self._switch(self._part)
        seconds = {part: round(spent, 6) for part, spent in self._spent.items() if spent}
        self._spent.clear()
        row = {"event": event, "time": self._before, **values, "seconds": seconds}
        if self._path is not None:
            metrics.append(self._path, row)
        elif self._active:
            self._waiting.append(row)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The time of a run in seconds: `parts`, which make up `wall`; what it `paused` is beside that.

    `processes` took part one after the other; `slow` are steps that took much longer than others. `lost` are the steps that each of
    the later ones had to do again, `rolled_back` those that the monitor did.
    """

    parts: Mapping[str, float]
    wall: float
    paused: float
    processes: int
    lost: tuple[int, ...]
    rolled_back: int
    slow: tuple[SlowStep, ...] = ()

    @property
    def share(self) -> float:
        """Of the time, that of steps which the run kept."""
        return self.parts.get(STEP, 0.0) / self.wall if self.wall else 0.0


def summary(rows: Iterable[Mapping[str, Any]]) -> Goodput | None:
    """The sums of the rows of a `goodput.jsonl`; None where there are none."""
    spent: collections.Counter[str] = collections.Counter()
    done: dict[int, dict[str, float]] = {}
    wall = paused = before = 0.0
    processes, rolled_back, how = 0, 0, ""
    lost: list[int] = []
    slow: list[SlowStep] = []
    fresh = False
    for row in rows:
        now, event, seconds = row["time"], row["event"], row.get("seconds", {})
        if event == "job_start":
            gap = max(0.0, now - before) if processes else 0.0
            if how in CLEAN:
                paused += gap
            else:
                spent[RECOVERY] += gap
                wall += gap
            processes, how, before, fresh = processes + 1, "", now, True
            continue
        wall += max(0.0, now - before)
        before = now
        if event == "step_end":
            done[row["step"]] = seconds
        if event == "slow_step":
            slow.append(SlowStep(**{field.name: row[field.name] for field in dataclasses.fields(SlowStep)}))
        for part, value in seconds.items():
            spent[part] += value
        if event == "goes_on_from":
            again = [step for step in done if step > row["step"]]
            for values in map(done.pop, again):
                for part in (STEP, DATA):
                    spent[part] -= values.get(part, 0.0)
                    spent[WASTED] += values.get(part, 0.0)
            if not fresh:
                rolled_back += len(again)
            elif processes > 1:
                lost.append(len(again))
            fresh = False
        how = row.get("how", "")
    if not processes:
        return None
    parts = {part: spent[part] for part in [*PARTS, *sorted(spent.keys() - PARTS.keys())] if spent[part] > 0}
    return Goodput(parts, wall, paused, processes, tuple(lost), rolled_back, tuple(slow))
