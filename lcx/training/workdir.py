"""A workdir belongs to one run: its config is kept there and compared before anything else is touched."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lcx.core import configs, processes
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.numbers import counted
from lcx.core.version import VERSION
from lcx.model.execution import FIELDS as EXECUTION_FIELDS
from lcx.training import metrics
from lcx.training.stages import RunConfig

CONFIG = "config.json"
OWN = "checksum"
"""Key of the config's own checksum, the last one in the file."""

LOCK, SHARED, PROGRAMS = ".lock", ".shared", "compiled"

SHARED_SECONDS = 10.0
"""In which a file that one host has written must be seen by all."""

MUTABLE_FIELDS = ("mesh", "checkpoint", "metrics", "max_bad_steps", "execution")
"""What may change between two starts of one run: how it is computed and kept, not what."""

FIXED_FIELDS = ("execution.compute_dtype", "execution.expert_matmul")
"""What may not although it is under one of them: numbers are rounded differently."""


def open_workdir(workdir: Path, run: RunConfig) -> None:
    """Make the folder and keep the config in it; raises `UserError` when it holds another run.

    Changes of `MUTABLE_FIELDS` and stages added at the end are the same run; one that came to no checkpoint is none.
    """
    make_workdir(workdir)
    path = workdir / CONFIG
    if path.exists() and begun(workdir):
        # Read as a config, so that fields which are younger than the run have their defaults.
        _compare(workdir, configs.plain(read_config(workdir)), configs.plain(run))
    if jax.process_index() == 0:
        write_config(workdir, run)


def write_config(workdir: Path, run: RunConfig) -> None:
    """Keep the config of the run, with a checksum of it."""
    values = configs.plain(run)
    write_atomically(workdir / CONFIG, json.dumps({**values, OWN: configs.fingerprint(values)}, indent=1) + "\n")


def make_workdir(workdir: Path) -> None:
    """Make the folder; raises `UserError` where that can't be."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is a file; name a directory")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be created ({error.strerror}); name another --workdir") from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"workdir {workdir} cannot be written to; name another --workdir")


def begun(workdir: Path) -> bool:
    """Has the run in a workdir come to a checkpoint, or to a decision?"""
    return metrics.read(workdir / "decisions.jsonl") != [] or any(path.name.isdigit() for path in workdir.glob("checkpoints*/*"))


def check_shared(workdir: Path) -> None:
    """Raises `UserError` in all processes of a job if one of them does not see in the workdir what the first one writes there."""
    if processes.count() == 1:
        return
    token, path = processes.exchange("token", os.urandom(8).hex())[0], workdir / SHARED
    if processes.is_first():
        write_atomically(path, token)
    processes.meet("workdir")
    until = time.monotonic() + SHARED_SECONDS
    while not (seen := path.exists() and path.read_text() == token) and time.monotonic() < until:
        time.sleep(0.2)
    everyone = processes.exchange("workdir", seen)
    if processes.is_first():
        path.unlink()
    if not all(everyone):
        raise UserError(
            f"{processes.named(everyone.index(False))} does not see in {workdir} what {processes.named(0)} writes there; name a "
            "--workdir on a file system that all hosts share"
        )


def keep_programs(workdir: Path) -> None:
    """Where a run may be started again by others than its user, keep its compiled programs in the workdir, unless JAX is told of
    another place."""
    if (processes.count() > 1 or processes.supervised()) and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / PROGRAMS))


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds the workdir for one training process of this host; raises `UserError` when another one has it.

    The lock goes with its process, however that ends. Where the file system has no locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with (workdir / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UserError(
                f"workdir {workdir} is in use by process {owner}; wait for it, end it, or name another --workdir"
            ) from None
        except OSError:
            pass
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def read_config(workdir: Path, way: str = "name the workdir of a training run") -> RunConfig:
    """The config of the run in a workdir; raises `UserError`, which ends in the `way` out, when there is none."""
    path = workdir / CONFIG
    if not path.exists():
        raise UserError(f"{workdir} does not hold a run ({CONFIG} is missing); {way}")
    return configs.build(RunConfig, _migrated(_read(path)), str(path))


def fingerprint(run: RunConfig) -> str:
    """Sixteen hex digits over everything that decides what the run computes."""
    fixed = {path: value for path, value in configs.leaves(configs.plain(run)) if not _is_mutable(path)}
    if run.adapters is None:  # as before there were any
        fixed = {path: value for path, value in fixed.items() if not path.startswith("lora.")}
    younger = {"shifted_group": None, "init_noise": 0.0}  # as before there were such fields
    fixed = {path: value for path, value in fixed.items() if younger.get(path.split(".")[-1], ...) != value}
    # Under the paths that lcx 0.1 hashed, so that checkpoints of then and now bear one fingerprint.
    return configs.fingerprint({re.sub(r"^execution\.", "model.", path): value for path, value in fixed.items()})


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and rerun the training command, which rewrites it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (not a JSON object); delete it and rerun the training command, which rewrites it")
    own = values.pop(OWN, None)
    if own is not None and own != configs.fingerprint(values):
        raise UserError(
            f"{path} is damaged (its checksum differs); put it back, or delete it and rerun the command that wrote it; if it was "
            f"changed on purpose, delete its last line, {OWN}"
        )
    return values


def _migrated(values: dict[str, Any]) -> dict[str, Any]:
    """The config of a run of lcx 0.1, where the fields of `ExecutionConfig` belonged to the model, and of later ones, where
    `metrics.tensorboard` said what `metrics.writers` does, in today's form."""
    if isinstance(log := values.get("metrics"), dict) and "tensorboard" in log:
        wanted = "jsonl,tensorboard" if log["tensorboard"] else "jsonl"
        values = {**values, "metrics": {"writers": wanted, **{name: value for name, value in log.items() if name != "tensorboard"}}}
    if not isinstance(model := values.get("model"), dict):
        return values
    moved = {name: model[name] for name in EXECUTION_FIELDS & model.keys()}
    kept = {name: value for name, value in model.items() if name not in moved}
    return {**values, "model": kept, "execution": {**values.get("execution", {}), **moved}}


def _compare(workdir: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if len(here["stages"]) > len(there["stages"]):
        here = {**here, "stages": here["stages"][: len(there["stages"])]}
    old, new = dict(configs.leaves(there)), dict(configs.leaves(here))
    names = {f"stages.{i}": f"stages.{stage['name']}" for i, stage in enumerate(here["stages"])}
    unset = object()
    differences = [
        f"{_named(path, names)} is {_shown(old, path)} there but {_shown(new, path)} here"
        for path in sorted({*old, *new})
        if not _is_mutable(path) and old.get(path, unset) != new.get(path, unset)
    ]
    if differences:
        others = len(differences) - 1
        more = f", and {counted(others, 'other value')} {'differs' if others == 1 else 'differ'}, too" if others else ""
        # On another kind of machine than the run began on, a config that leaves the type to the machine finds another.
        dtype, way = "execution.compute_dtype", "name another --workdir"
        if differences[0].startswith(dtype) and not more:
            way = f"give --config.{dtype}={old.get(dtype)}, or {way}"
        raise UserError(f"workdir {workdir} holds a run with another config: {differences[0]}{more}; {way}")


def _shown(values: Mapping[str, Any], path: str) -> str:
    """A value of a config, for a sentence."""
    return repr(values[path]) if path in values else "not set"


def _named(path: str, names: dict[str, str]) -> str:
    """A path with the stage's name for its number."""
    head = ".".join(path.split(".")[:2])
    return names.get(head, head) + path[len(head) :]


def _is_mutable(path: str) -> bool:
    parts = path.split(".")
    if parts[0] == "stages" and len(parts) > 2:
        parts = parts[2:] if parts[2] == "mesh" else parts
    path = ".".join(parts)
    return path not in FIXED_FIELDS and any(path == name or path.startswith(name + ".") for name in MUTABLE_FIELDS)


def record_environment(workdir: Path, command: Sequence[str]) -> Path:
    """Write `environment.json`: versions, devices, and the command as it was typed."""
    devices = jax.devices()
    values = {
        "command": shlex.join(command),
        "lcx": VERSION,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }
    return write_atomically(workdir / "environment.json", json.dumps(values, indent=1) + "\n")
