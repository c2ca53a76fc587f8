"""The work of `lcx.data.curation.workers` on Ray, for more than one machine.

Ray Data is not used: it reads its input in Ray's own workers, while here the parent reads, skips the shards that are done and
writes the others in order. What is left for Ray is a stream of tasks, which its tasks are made for; it schedules them, moves
documents and results between machines, and says when one dies. Nodes need the same version of lcx and of Python.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.data.curation.workers import Runner


@contextlib.contextmanager
def engine(address: str | None = None, workers: int | None = None, **resources: float) -> Iterator[Runner]:
    """A `Runner` on the cluster at `address`, `auto` for one that runs on this machine, or on a cluster of its own.

    Without an address that of the environment (RAY_ADDRESS) is taken; without that too a local cluster with `workers` CPUs starts
    and ends with the body. `workers` bounds how many tasks run at once (None: one per CPU of the cluster). `resources` are what a
    task takes, by Ray's names (default: num_cpus=1). Raises `UserError` without Ray and for a cluster that does not answer.
    """
    ray = library("ray", "--engine=ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray announces that it will leave this variable alone; lcx sets no accelerators for its tasks.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        if address:
            raise UserError(
                f"the Ray cluster at {address!r} does not answer: {_first_line(error)}; check --ray_address or RAY_ADDRESS, "
                "without either a local cluster is started"
            ) from error
        raise UserError(f"Ray cannot start on this machine: {_first_line(error)}; leave out --engine=ray") from error
    try:
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield lambda function, tasks: _ordered(ray, function, tasks, most, resources or {"num_cpus": 1})
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises `OSError` where nothing answers at HOST:PORT, about which Ray would wait and warn for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ordered(ray: Any, function: Callable, tasks: Iterable, workers: int, resources: Mapping[str, float]) -> Iterator[Any]:
    """The results in order; at most `workers` tasks run, and of twice as many the results have not been taken."""
    remote = ray.remote(max_retries=0, **resources)(function)
    waiting: collections.deque = collections.deque()
    try:
        for task in tasks:
            if len(waiting) == 2 * workers:
                yield _result(ray, waiting.popleft())
            if len(waiting) >= workers:
                _, running = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
                if len(running) >= workers:
                    ray.wait(running, num_returns=len(running) - workers + 1)
            waiting.append(remote.remote(task))
            del task
        while waiting:
            yield _result(ray, waiting.popleft())
    finally:
        for one in waiting:
            ray.cancel(one, force=True)


def _result(ray: Any, one: Any) -> Any:
    """A task's result; raises what the task raised, and `UserError` if its worker or node is gone."""
    try:
        return ray.get(one)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a worker of the Ray cluster ended ({type(error).__name__}: {_first_line(error)}), often for want of memory; rerun "
            "the command with fewer --workers, it resumes from there"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")[:200]
