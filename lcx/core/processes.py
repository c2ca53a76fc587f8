"""The processes of one job: what they tell each other outside of any program, and what this one is doing.

A process alone passes through all of this at once. The values travel through the key-value store of JAX's distributed service,
which has no public name; Orbax uses it in the same way. Nothing is compiled for them.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from lcx.core.errors import UserError

PATIENCE = 600.0
"""Seconds for which a process waits for the others at a meeting point."""

PIPE = "LCX_PULSE"
"""Environment variable of a supervised process: its end of the pipe to its supervisor."""

KEY = "lcx"
"""The folder of the key-value store that holds what lcx's processes say."""


class AllStop(SystemExit):
    """Ends this process, with its status, as every other process of the job ends now."""


@dataclasses.dataclass
class Doing:
    """What this process is doing, in words, and how often that has changed."""

    what: str = "starting"
    moves: int = 0


class _Job:
    """What belongs to this process as a part of its job, as JAX's own state does."""

    def __init__(self) -> None:
        self.doing = Doing()
        self.hosts: list[str] = []
        self.calls: dict[str, itertools.count] = collections.defaultdict(itertools.count)
        self.lock = threading.Lock()


_JOB = _Job()


def supervised() -> bool:
    """Whether a process of lcx stands over this one and may start it again."""
    return PIPE in os.environ


def client() -> Any:
    """The client of JAX's distributed service; None in a process alone."""
    from jax._src import distributed

    return distributed.global_state.client


def index() -> int:
    """The number of this process; 0 in a process alone. Starts no backend."""
    from jax._src import distributed

    return distributed.global_state.process_id or 0


def count() -> int:
    """The number of processes of this job. Starts no backend."""
    from jax._src import distributed

    return distributed.global_state.num_processes or 1


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return index() == 0


def doing(what: str) -> None:
    """Note what this process does now: others are told it if the process is lost or hangs."""
    with _JOB.lock:
        _JOB.doing = Doing(what, _JOB.doing.moves + 1)


def now_doing() -> Doing:
    """What this process noted last."""
    return _JOB.doing


def name_hosts(hosts: list[str]) -> None:
    """Note the host of each process."""
    _JOB.hosts = hosts


def named(process: int) -> str:
    """A process as messages call it."""
    return f"process {process}" + (f" on {_JOB.hosts[process]}" if process < len(_JOB.hosts) else "")


def exchange(name: str, value: Any, timeout: float = PATIENCE) -> list[Any]:
    """The `value` of each process, in their order, once all have called this with the same name; values are JSON.

    Every process makes the same calls in the same order. Raises `UserError` naming a process that does not come in `timeout`
    seconds.
    """
    if count() == 1:
        return [value]
    key, store = f"{KEY}/{name}/{next(_JOB.calls[name])}", client()
    store.key_value_set(f"{key}/{index()}", json.dumps(value))
    try:
        store.wait_at_barrier(key, int(1000 * timeout))
    except Exception as error:
        missing = sorted(set(range(count())) - _said(store, key).keys())
        if not missing:
            raise
        raise UserError(
            f"{named(missing[0])} did not come to {name!r} within {timeout:g} s; see what its own log says, and start all again"
        ) from error
    found = _said(store, key)
    return [json.loads(found[process]) for process in range(count())]


def _said(store: Any, key: str) -> dict[int, str]:
    """What is in a folder of the store, by process."""
    return {int(name.rpartition("/")[2]): value for name, value in store.key_value_dir_get(key)}


def meet(name: str, timeout: float = PATIENCE) -> None:
    """Return once every process has come here."""
    exchange(name, None, timeout)


def agree(name: str, values: Mapping[str, Any], hint: str) -> None:
    """Raises `UserError`, in every process alike, for a value that is not the same in all: it names the value and two processes.

    `hint` says how to make them the same.
    """
    digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
    if len(set(exchange(f"{name} (digest)", digest))) == 1:
        return
    everyone = exchange(name, dict(values))
    for process, theirs in enumerate(everyone):
        for key in sorted({*everyone[0], *theirs}):
            ours, other = everyone[0].get(key, "absent"), theirs.get(key, "absent")
            if ours != other:
                raise UserError(f"{key} is {_shown(other)} in {named(process)} but {_shown(ours)} in {named(0)}; {hint}")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
