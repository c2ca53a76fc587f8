"""The flags of commands that several processes can do together, each of which is started with the same command."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from absl import flags

from lcx.cli import parse
from lcx.core import configs, processes
from lcx.core.errors import UserError
from lcx.launch import supervisor
from lcx.launch.cluster import AUTO, find_job

COMMANDS = ("run", "train", "eval", "generate", "doremi")

OWN = ("distributed", "num_processes", "process_id", "initialization_timeout", "heartbeat_timeout", "hang_timeout", "max_restarts")
"""Flags that say how a process joins its job; all others must be the same in all of them."""


def define(values: flags.FlagValues) -> None:
    """Define them."""
    flags.DEFINE_string(
        "distributed",
        AUTO,
        "auto: with all processes that Slurm, MPI, GKE or a TPU slice has started; off; or the address HOST:PORT of process 0",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "with --distributed=HOST:PORT, how many there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "with --distributed=HOST:PORT, which of them this one is, from 0", flag_values=values)
    flags.DEFINE_float("initialization_timeout", 300.0, "seconds in which all processes must start", flag_values=values)
    flags.DEFINE_float(
        "heartbeat_timeout", 30.0, "seconds after which a process without a sign of life is given up", flag_values=values
    )
    flags.DEFINE_float(
        "hang_timeout", 1800.0, "seconds after which a job in which a process does not get on is ended", flag_values=values
    )
    flags.DEFINE_integer(
        "max_restarts", 0, "how often to start again by itself after another process was lost", lower_bound=0, flag_values=values
    )


def stand_over(name: str, words: Sequence[str]) -> None:
    """Become the supervisor of the process that computes, where one is needed; returns in that process, and where none is.

    One is needed for a job of several processes, and to start again.
    """
    if processes.supervised():
        supervisor.end_with_supervisor()
        return
    if name not in COMMANDS or any(word in ("-h", "--help", "-help") for word in words):
        return
    restarts, silence = (_number(parse.given(words, flag)) for flag in ("max_restarts", "heartbeat_timeout"))
    try:
        ids = [_number(parse.given(words, flag)) for flag in ("num_processes", "process_id")]
        job = find_job(parse.given(words, "distributed") or AUTO, *(None if x is None else int(x) for x in ids))
    except UserError:
        return  # said again when all flags are read
    if job is not None or restarts:
        command = [sys.executable, "-m", "lcx.cli", *name.split(), *words]
        sys.exit(supervisor.supervise(command, int(restarts or 0), silence or 30.0))


def joined(name: str, values: flags.FlagValues) -> AbstractContextManager[None]:
    """Around the command: it is one of its job's processes."""
    if name not in COMMANDS:
        return contextlib.nullcontext()
    for flag in ("initialization_timeout", "heartbeat_timeout", "hang_timeout"):
        if values[flag].value <= 0:
            raise UserError(f"--{flag}={values[flag].value:g} must be above 0 seconds")
    job = find_job(values.distributed, values.num_processes, values.process_id)
    if job is None:
        return contextlib.nullcontext()
    # Loaded only now: a process alone does without.
    from lcx.launch import distributed

    patience = distributed.Patience(values.initialization_timeout, values.heartbeat_timeout, values.hang_timeout)
    return distributed.joined(job, patience, lambda: _said(values))


def _said(values: flags.FlagValues) -> dict[str, Any]:
    """What the command was told, by flag, and of a config every value."""
    found: dict[str, Any] = {}
    for name in values:
        value = values[name].value
        if name in OWN:
            continue
        if hasattr(value, "to_dict"):
            found |= {f"--config.{key}": configs.plain(leaf) for key, leaf in configs.leaves(value.to_dict())}
        else:
            found[f"--{name}"] = configs.plain(value)
    return found


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
