"""Asks a process of its own to compile a stage's step (`child.py`), and reads what it says or its compiler wrote (`dumped.py`)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.planning import dumped
from lcx.planning.schedule import Collective, read_schedule
from lcx.planning.topology import Topology
from lcx.training.stages import RunConfig

COMMAND = (sys.executable, "-m", "lcx.planning.child")
"""The process that compiles."""

POLL = 0.2
"""Seconds between two looks at what it has written."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says about a step; sizes in bytes on a device.

    `needed`: the most that the step holds at once in the device's memory, its arguments included; `host` what it holds on the
    host. Where that is more than there is (`fits` is False), the compiler stops there: `memory` and `collectives` are empty.
    `state`: the parameters and the optimizer's part of the arguments. `kernels` and `others`: operations of all devices,
    counted in the traced step. `seconds`: until it was known, tracing included.
    """

    fits: bool
    needed: float
    host: float
    memory: dict[str, int]
    state: dict[str, int]
    kernels: float
    others: float
    collectives: tuple[Collective, ...]
    seconds: float


def compile_step(run: RunConfig, stage: int, where: Topology) -> Compiled:
    """The step of stage `stage` compiled for a topology; takes about a minute and 2 GiB; code is made for CPUs alone.

    Raises `UserError` if there is no such slice, no compiler for it, the stage does not divide over it, or the compiler gives up.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lcx-plan-") as name:
        folder = Path(name)
        request = {"run": configs.plain(run), "stage": stage, "name": where.name, "shape": where.shape, "slices": where.slices}
        (folder / "request").write_text(json.dumps({**request, "dump": str(folder / "dump")}))
        code, reply = _reply(folder, environment(where))
        if "error" in reply:
            raise UserError(reply["error"])
        if not {"memory", "exhausted"} & set(reply):
            raise UserError(_gave_up(run, stage, where, code, (folder / "stderr").read_text(errors="replace")))
    return _read(reply, time.perf_counter() - begin)


def _reply(folder: Path, variables: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """The exit status of the process that compiles, and all that it or its compiler said; it is ended once that is enough."""
    with (folder / "request").open() as given, (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        child = subprocess.Popen(COMMAND, stdin=given, stdout=out, stderr=err, env=variables)
    try:
        while True:
            ended = child.poll() is not None
            said = _said(folder)
            found = dumped.written(folder / "dump", said["program"]) if "program" in said else None
            if found is not None and "exhausted" not in said:
                text, buffers = found
                return 0, {**said, "memory": dumped.memory(buffers), "text": text}
            if ended:
                return child.returncode, said
            time.sleep(POLL)
    finally:
        child.kill()
        child.wait()


def _said(folder: Path) -> dict[str, Any]:
    """What the process has written so far, whole lines alone."""
    found: dict[str, Any] = {}
    for line in (folder / "stdout").read_text().splitlines(keepends=True):
        if line.endswith("\n") and line.startswith("{"):
            found |= json.loads(line)
    return found


def environment(where: Topology) -> dict[str, str]:
    """Variables of the process that compiles: a CPU's devices, or where libtpu lies; no chip is looked for."""
    package = str(Path(__file__).parents[2])
    known = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if where.chip.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        return {**known, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={where.devices}".strip()}
    library = _libtpu()
    return {**known, "TPU_LIBRARY_PATH": str(library), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


def has_compiler(where: Topology) -> bool:
    """Whether this machine has a compiler for a topology."""
    return where.chip.platform == "cpu" or (where.compiles and _find_libtpu() is not None)


def _find_libtpu() -> Path | None:
    given = os.environ.get("TPU_LIBRARY_PATH")
    spec = importlib.util.find_spec("libtpu")
    installed = [] if spec is None else [Path(folder) / "libtpu.so" for folder in spec.submodule_search_locations or []]
    # `make` puts it beside the packages: see the Makefile.
    found = [*([Path(given)] if given else []), *installed, Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"]
    return next((path for path in found if path.is_file()), None)


def _libtpu() -> Path:
    library = _find_libtpu()
    if library is None:
        raise UserError(
            "compiling for a TPU needs libtpu, which is not installed; install it with pip install libtpu (Linux on x86-64), or "
            "plan by arithmetic with --nocompile"
        )
    return library


def _read(reply: Mapping[str, Any], seconds: float) -> Compiled:
    asked, memory = reply.get("exhausted"), reply.get("memory", {})
    return Compiled(
        fits=asked is None,
        needed=float(memory["peak"]) if asked is None else used(asked),
        host=float(memory.get("host_temporary", 0)),
        memory=dict(memory),
        state=reply["state"],
        kernels=reply["operations"]["kernels"],
        others=reply["operations"]["others"],
        collectives=tuple(read_schedule(reply["text"], reply["mesh"])) if asked is None else (),
        seconds=seconds,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def used(message: str) -> float:
    """Bytes that a compiler asked for in vain, from its message: `Used 134.44G of 95.74G`, or of temporaries alone."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        found = re.search(r"(?:total|allocate|allocating) ([\d.]+)\s*([KMGT]?)i?B?\b", message)
    return float(found[1]) * _UNITS[found[2]] if found else float("inf")


def _gave_up(run: RunConfig, stage: int, where: Topology, code: int, stderr: str) -> str:
    """One sentence about a process that ended without a reply."""
    lines = stderr.strip().splitlines()
    failed = _first(lines, "Check failed")
    what = f"stages.{run.stages[stage].name} on {where}"
    if failed:
        said = failed[failed.index("Check failed") :][:200]
        return (
            f"{what}: the compiler gave up ({said}), as it does for arrays of more than 2^31 numbers on a device; use shorter "
            "rows or more devices (mesh.context)"
        )
    if code in (-9, 137):
        return f"{what}: the compiler was killed, most likely for want of memory on this machine; it takes 2 to 8 GiB"
    said = _first(lines[::-1], "Error") or (lines[-1] if lines else f"exit status {code}")
    return f"{what}: the compiler gave up: {' '.join(said.split())[:300]}; plan by arithmetic with --nocompile"


def _first(lines: Sequence[str], word: str) -> str | None:
    return next((line for line in lines if word in line), None)
