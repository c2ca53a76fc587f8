"""Asks a process of its own to compile a stage's step, and reads what it says (`child.py`)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.planning.schedule import Collective
from lcx.planning.topology import Topology
from lcx.training.stages import RunConfig

COMMAND = (sys.executable, "-m", "lcx.planning.child")
"""The process that compiles."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says about a step; sizes in bytes on a device.

    `needed`: the most that the step holds at once in the device's memory, its arguments included; `host` what it holds on the
    host. Where that is more than there is (`fits` is False), the compiler stops there: `memory` and `collectives` are empty.
    `state`: the parameters and the optimizer's part of the arguments. `kernels` and `others`: operations of all devices,
    counted in the traced step.
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
    """The step of stage `stage` compiled for a topology; takes a minute and some GiB.

    Raises `UserError` if there is no such slice, no compiler for it, the stage does not divide over it, or the compiler gives up.
    """
    request = {"run": configs.plain(run), "stage": stage, "name": where.name, "shape": where.shape, "slices": where.slices}
    done = subprocess.run(
        COMMAND,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment(where),
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise UserError(_gave_up(run, stage, where, done.returncode, done.stderr))
    reply = json.loads(lines[-1])
    if "error" in reply:
        raise UserError(reply["error"])
    return _read(reply)


def environment(where: Topology) -> dict[str, str]:
    """Variables of the process that compiles: a CPU's devices, or where libtpu lies; no chip is looked for."""
    package = str(Path(__file__).parents[2])
    known = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if where.chip.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        return {**known, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={where.devices}".strip()}
    library = _libtpu()
    return {**known, "TPU_LIBRARY_PATH": str(library), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


def _libtpu() -> Path:
    given = os.environ.get("TPU_LIBRARY_PATH")
    spec = importlib.util.find_spec("libtpu")
    installed = [] if spec is None else [Path(folder) / "libtpu.so" for folder in spec.submodule_search_locations or []]
    # `make` puts it beside the packages: see the Makefile.
    found = [*([Path(given)] if given else []), *installed, Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"]
    library = next((path for path in found if path.is_file()), None)
    if library is None:
        raise UserError(
            "compiling for a TPU needs libtpu, which is not installed; install it with pip install libtpu (Linux on x86-64), or "
            "plan by arithmetic with --nocompile"
        )
    return library


def _read(reply: Mapping[str, Any]) -> Compiled:
    asked = reply.get("exhausted")
    memory = reply.get("memory", {})
    if asked is None:
        # A TPU's compiler knows the peak, in which results take the place of arguments; others say the sizes alone.
        held = memory["arguments"] + memory["temporary"] + memory["outputs"] - memory["aliased"]
        needed = max(memory["peak"], memory["arguments"]) if memory["peak"] else held
        host = memory["host_arguments"] + memory["host_temporary"] + memory["host_outputs"] - memory["host_aliased"]
    else:
        needed, host = used(asked), 0
    return Compiled(
        fits=asked is None,
        needed=float(needed),
        host=float(host),
        memory=dict(memory),
        state=reply["state"],
        kernels=reply["operations"]["kernels"],
        others=reply["operations"]["others"],
        collectives=tuple(Collective(**{**one, "axes": tuple(one["axes"])}) for one in reply.get("collectives", ())),
        seconds=reply["compile_seconds"],
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def used(message: str) -> float:
    """Bytes that a compiler asked for in vain, from its message `Used 134.44G of 95.74G hbm`."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
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
