"""The same function over a stream of tasks in this process or in several, with results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, Protocol, TypeVar

from lcx.core.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Runner(Protocol):
    """What computes the results of a function that a module defines, in the order of its tasks, drawing few tasks ahead."""

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        """The results; raises what the function raised, and `UserError` if a worker died."""
        ...


def ordered(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """The results of a function that a module defines, in order; `workers` = 1 starts no process.

    Tasks are drawn as workers become free, and no more than a few per worker are on their way. Workers read and write no file, so
    one that outlives a killed parent for a moment does no harm. Raises what the function raised, and `UserError` if a worker died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    crew = _Crew(function, workers)
    try:
        yield from crew.run(tasks)
    finally:
        crew.close()


class _Crew:
    """Processes, each at the other end of a pipe."""

    def __init__(self, function: Callable, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._idle = {}, []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
            self._idle.append(ours)
        self._busy: dict[Connection, int] = {}
        self._results: dict[int, Any] = {}

    def run(self, tasks: Iterable) -> Iterator[Any]:
        done, most = 0, 2 * len(self._processes)
        for number, task in enumerate(tasks):
            while not self._idle or number - done >= most:
                self._collect()
                while done in self._results:
                    yield self._results.pop(done)
                    done += 1
            worker = self._idle.pop()
            self._busy[worker] = number
            try:
                worker.send(task)
            except OSError:
                self._died(worker)
        while self._busy or self._results:
            while done in self._results:
                yield self._results.pop(done)
                done += 1
            if self._busy:
                self._collect()

    def close(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
            process.join()

    def _collect(self) -> None:
        """Wait for at least one result."""
        for worker in wait(list(self._busy)):
            assert isinstance(worker, Connection)
            try:
                good, result = worker.recv()
            except (EOFError, OSError):
                self._died(worker)
            if not good:
                raise result
            self._results[self._busy.pop(worker)] = result
            self._idle.append(worker)

    def _died(self, worker: Connection) -> NoReturn:
        process = self._processes[worker]
        process.join(5)
        raise UserError(
            f"a worker process ended with exit code {process.exitcode}, often for want of memory; rerun the command with fewer "
            "--workers, it resumes from there"
        )


def _serve(connection: Connection, function: Callable) -> None:
    """Answer tasks until the other end is closed, which the end of the parent does too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, function(task)
        except Exception as error:
            answer = False, error
        del task
        try:
            connection.send(answer)
        except OSError:
            return
        del answer
