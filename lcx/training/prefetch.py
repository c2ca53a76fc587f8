"""Batches prepared while the device computes, and signals that ask a run to stop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.core import host, processes
from lcx.core.batch import Batch
from lcx.core.console import warn

AHEAD = 2


class Prefetcher:
    """The batches of steps `start` to `stop - 1` in order; one thread prepares the next `AHEAD`. A context manager."""

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int):
        self._make, self._next, self._stop = make, start, stop
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._waiting: deque[concurrent.futures.Future[Batch]] = deque()

    def __enter__(self) -> "Prefetcher":
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> tuple[Batch, float]:
        """The next batch and the seconds that were spent waiting for it."""
        begin = time.perf_counter()
        batch = self._waiting.popleft().result()
        self._fill()
        return batch, time.perf_counter() - begin

    def _fill(self) -> None:
        while len(self._waiting) < AHEAD and self._next < self._stop:
            self._waiting.append(self._pool.submit(self._make, self._next))
            self._next += 1


class Stop:
    """While entered, the first Ctrl-C or SIGTERM only sets `signal`; a second Ctrl-C interrupts at once.

    Of several processes any may be told to stop; `now` lets all of them do so after the same step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._plan = _AFTER_STEP
        self._asked: jax.Array | None = None
        self._before: Mapping[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def now(self, mesh: Mesh) -> int | None:
        """The signal after which to stop now, None to go on. Every process asks after every step, and all hear the same.

        What each of several processes knows goes over the devices of the mesh, behind the step, and is read one step later.
        """
        if processes.count() == 1:
            return self.signal
        asked, self._asked = self._asked, _largest(mesh)(_by_device(mesh, self.signal or 0))
        return None if asked is None else int(asked) or None

    @contextlib.contextmanager
    def before_a_step(self) -> Iterator[None]:
        """While entered there is no step to wait for, which a signal is answered with by a process alone."""
        self._plan = "stopping" if processes.count() == 1 else _AFTER_STEP
        yield
        self._plan = _AFTER_STEP

    def compiled(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled | None:
        """The compiled program; None once a signal has come, for which a compiler that hears none is left alone in its thread.

        Several processes, which have to compile together, wait for the compiler.
        """
        if processes.count() > 1 or not self._before:
            return lowered.compile()
        found: concurrent.futures.Future[jax.stages.Compiled] = concurrent.futures.Future()
        threading.Thread(target=_settle, args=(found, lowered.compile), name=host.LEFT_ALONE, daemon=True).start()
        while self.signal is None and not found.done():
            concurrent.futures.wait([found], timeout=0.2)
        return None if self.signal is not None else found.result()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        warn(f"{signal.Signals(number).name}: {self._plan}")


_AFTER_STEP = "saving after this step; press Ctrl-C again to stop immediately"


def _settle(found: concurrent.futures.Future, run: Callable[[], Any]) -> None:
    """Give a future what `run` gives or raises."""
    try:
        found.set_result(run())
    except BaseException as error:
        found.set_exception(error)


def _by_device(mesh: Mesh, value: int) -> jax.Array:
    """int32 `[devices]`, to which each process gives its value."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))


@functools.lru_cache(maxsize=8)
def _largest(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
