"""Steps that took much longer than those before them, and the process that kept the others waiting.

All processes end a step together, so how long it took does not say whose fault that was. What differs is when each was ready for
it: one that is ready after the end of the step before has kept its devices, and with them all others, waiting so long.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics

from lcx.core import processes

FACTOR, MORE, LEAST = 2.0, 1.0, 8
"""A step is slow if it takes more than so many times the median of those before it, and so many seconds more; of those before it
there have to be so many."""

RECENT, MOST = 64, 5
"""Steps that the median is of, and slow steps that are told of at a time."""


@dataclasses.dataclass(frozen=True)
class SlowStep:
    """Step `step` of the run took `took` seconds, where `usual` are usual; the `process` of that name was ready last, `late`
    seconds after the end of the step before, and had waited `data` of them for its batch."""

    step: int
    took: float
    usual: float
    process: str
    late: float
    data: float

    @property
    def sentence(self) -> str:
        """For the screen."""
        text = f"step {self.step} took {self.took:,.1f} s where {self.usual:,.1f} s are usual"
        if self.late < (self.took - self.usual) / 2:
            return f"{text}, and no process was late for it: a device or the network was slow"
        whose = f"; {self.data:,.1f} s of that it waited for data" if self.data > self.late / 2 else ""
        return f"{text}: {self.process} was ready {self.late:,.1f} s late{whose}"


@dataclasses.dataclass(frozen=True)
class _Seen:
    seconds: float
    usual: float
    late: float
    data: float


class SlowSteps:
    """Watches the steps of a stage in this process."""

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._seen: dict[int, _Seen] = {}
        self._skipped = False

    def skip(self) -> None:
        """The next step's time is not its own alone: something else was done before it."""
        self._skipped = True

    def add(self, step: int, seconds: float, late: float, data: float) -> None:
        """A step: how long it took, how much of that this process was not ready for it, and waited for its batch."""
        if self._skipped:
            self._skipped = False
            return
        usual = statistics.median(self._recent) if len(self._recent) >= LEAST else seconds
        self._seen[step] = _Seen(seconds, usual, late, data)
        self._recent.append(seconds)

    def gather(self) -> list[SlowStep]:
        """What was slow since the last call; all processes call this, and get the same."""
        slow = [step for step, one in self._seen.items() if one.seconds > max(FACTOR * one.usual, one.usual + MORE)]
        own = sorted(sorted(slow, key=lambda step: -self._seen[step].seconds)[:MOST])
        steps = sorted({step for found in processes.exchange("slow steps", own) for step in found})
        told: list[SlowStep] = []
        if steps:
            nothing = _Seen(0.0, 0.0, 0.0, 0.0)
            seen = [dataclasses.astuple(self._seen.get(step, nothing)) for step in steps]
            by_process = processes.exchange("who was late", seen)
            for step, of_each in zip(steps, zip(*by_process, strict=True), strict=True):
                process = max(range(len(of_each)), key=lambda i, of_each=of_each: of_each[i][2])
                seconds, usual = max(each[:2] for each in of_each)
                told.append(SlowStep(step, seconds, usual, processes.named(process), *of_each[process][2:]))
        self._seen.clear()
        return told
