"""The plan of a run: for every stage whether it fits, what it holds, how long its steps take, and what all of it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.core import configs
from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.core.host import available_memory
from lcx.core.mesh import MeshConfig
from lcx.core.numbers import size
from lcx.planning.compile import Compiled, compile_step
from lcx.planning.memory import Held, held
from lcx.planning.program import sizes_over
from lcx.planning.roofline import StepTime, step_time
from lcx.planning.topology import Topology
from lcx.planning.work import Work, work_of
from lcx.training.stages import RunConfig, StageConfig


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage on a topology; bytes are of one device.

    `ratio`: what the compiler asked for over what arithmetic says, 1 where it was not asked.
    """

    stage: StageConfig
    where: Topology
    mesh: dict[str, int]
    work: Work
    held: Held
    time: StepTime
    compiled: Compiled | None = None
    ratio: float = 1.0

    @property
    def needed(self) -> float:
        """Bytes of the device's memory that a step takes: the compiler's where it was asked."""
        return self.held.total * self.ratio if self.compiled is None else self.compiled.needed

    @property
    def host(self) -> float:
        """Bytes of the host's memory."""
        return self.compiled.host if self.compiled is not None and self.compiled.host else self.held.host

    @property
    def room(self) -> float:
        """Bytes that there are."""
        return room(self.where)

    @property
    def fits(self) -> bool:
        """Whether device and host have what a step takes."""
        there = self.compiled.fits if self.compiled is not None else True
        return there and self.needed <= self.room and (self.host <= self.where.host or self.where.chip.platform == "cpu")

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.stage.batch_size * self.stage.seq_len

    @property
    def hours(self) -> float:
        """Of all steps, without compilation, checkpoints and evaluations."""
        return self.time.seconds * self.stage.steps / 3600

    @property
    def chip_hours(self) -> float:
        """Hours times chips."""
        return self.hours * self.where.chips


def room(where: Topology) -> float:
    """Bytes of a device that a program may take; of this machine's CPU, each device's part of what is free now."""
    return available_memory() / where.devices if where.chip.platform == "cpu" else where.memory


def stage_plan(
    run: RunConfig, index: int, where: Topology, compiled: Compiled | None = None, mesh_config: MeshConfig | None = None
) -> StagePlan:
    """The plan of stage `index` by arithmetic, with what a compiler said of it, if asked; `mesh_config` in place of its mesh.

    Raises `UserError` where the stage does not divide over the topology's devices.
    """
    stage = run.stages[index]
    mesh = sizes_over(run, index, where.devices, where.slices, mesh_config)
    work = work_of(run.model, run.execution, stage.batch_size, stage.seq_len, stage.accumulate, mesh, where.chip)
    found = held(run, stage, mesh, where)
    ratio = compiled.needed / found.total if compiled is not None else 1.0
    return StagePlan(stage, where, mesh, work, found, step_time(work, where), compiled, ratio)


def compiled_plan(run: RunConfig, index: int, where: Topology) -> StagePlan:
    """The plan of a stage whose step has been compiled; raises `UserError` as `compile_step` does."""
    stage_plan(run, index, where)  # what does not divide is said before a minute is spent
    if not where.compiles:
        raise UserError(f"--topology={where}: no compiler for {where.name} works without one; plan by arithmetic with --nocompile")
    return stage_plan(run, index, where, compile_step(run, index, where))


def fullest(run: RunConfig, where: Topology) -> int:
    """The stage that needs the most memory."""
    needed = [stage_plan(run, index, where).needed for index in range(len(run.stages))]
    return needed.index(max(needed))


def stage_index(run: RunConfig, name: str) -> int:
    """The number of the stage of a name; raises `UserError` naming the nearest."""
    names = [stage.name for stage in run.stages]
    return names.index(choice("--stage", name, names))


def changed(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with other values under dotted keys, as in {"execution.remat": "block", "stages.NAME.accumulate": 2}.

    A key of `mesh` also changes the meshes of stages that have their own. Raises `UserError` for a key that there is not.
    """
    values = configs.plain(run)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if first == "stages":
            name, _, rest = rest.partition(".")
            places = [values["stages"][stage_index(run, name)]]
        else:
            places, rest = [values], key
            if first == "mesh":
                places += [stage for stage in values["stages"] if stage["mesh"] is not None]
        for place in places:
            _put(place, rest, value, key)
    return configs.build(RunConfig, values)


def _put(place: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set a key, which stands behind that of a stage, if any, in the one that is `said`."""
    *parents, last = key.split(".")
    for i, part in enumerate([*parents, last]):
        if not isinstance(place, dict):
            raise UserError(f"--what_if={said}: {parents[i - 1]} holds {place!r} and no fields; change it as a whole in the config")
        if part not in place:
            where = parents[i - 1] if i else "a run"
            raise UserError(f"--what_if={said}: {where} has no field {part!r}{configs.nearest(part, place)}")
        if i < len(parents):
            place = place[part]
    place[last] = value


def sentence(plan: StagePlan) -> str:
    """Whether the stage fits, and by how much."""
    where, stage = plan.where, plan.stage
    need = f"stages.{stage.name}: a step of {stage.seq_len:,} tokens a row needs {size(plan.needed)}"
    need += f" of the {size(plan.room)} of each device"
    need += f" and {size(plan.host)} of the host's {size(where.host)}" if plan.host else ""
    how = "by arithmetic" if plan.compiled is None else "as compiled"
    return f"{need} of {where}, {how}: it {'fits' if plan.fits else 'does not fit'}"


def as_json(plan: StagePlan) -> dict[str, Any]:
    """The plan as plain values."""
    time, compiled = plan.time, plan.compiled
    found: dict[str, Any] = {
        "stage": plan.stage.name,
        "topology": str(plan.where),
        "chips": plan.where.chips,
        "devices": plan.where.devices,
        "seq_len": plan.stage.seq_len,
        "batch_size": plan.stage.batch_size,
        "accumulate": plan.stage.accumulate,
        "steps": plan.stage.steps,
        "mesh": plan.mesh,
        "strategy": plan.work.strategy,
        "remat": plan.work.policy,
        "fits": plan.fits,
        "bytes": {
            "needed": plan.needed,
            "room": plan.room,
            "host": plan.host,
            "host_room": plan.where.host,
            "by_arithmetic": plan.held.parts,
            "moment": plan.held.moment,
        },
        "flops": {"model": time.useful * plan.where.devices},
        "step": {
            "seconds": time.seconds,
            "mfu": time.mfu,
            "tokens_per_second": plan.tokens / time.seconds,
            "bound": time.bound,
            "by_part": time.by_part,
        },
        "hours": plan.hours,
        "chip_hours": plan.chip_hours,
    }
    if compiled is not None:
        found["flops"] |= {"program_kernels": compiled.kernels, "program_others": compiled.others}
        found["compiled"] = {"memory": compiled.memory, "state": compiled.state, "seconds": compiled.seconds, "fits": compiled.fits}
        found["collectives"] = [{**vars(one), "bytes": one.bytes} for one in compiled.collectives]
    return found


TRANSFER = ("transfer", "along", "for", "each", "times", "in all", "hidden")
"""The columns of `transfers`."""

WORTH = 1e6
"""Bytes in all from which on a transfer is listed."""


def transfers(compiled: Compiled) -> list[tuple[list[str], bool]]:
    """What a compiled step sends, a row of `TRANSFER` each, and whether the schedule hides it."""
    return [
        (
            [
                one.kind, " x ".join(one.axes), one.part, size(one.size), f"{one.times:,}", size(one.bytes),
                "yes" if one.hidden else "no",
            ],
            one.hidden,
        )
        for one in compiled.collectives
        if one.bytes >= WORTH
    ]  # fmt: skip


def totals(plans: Sequence[StagePlan]) -> dict[str, float]:
    """Hours, chip-hours and tokens of all stages."""
    return {
        "hours": sum(plan.hours for plan in plans),
        "chip_hours": sum(plan.chip_hours for plan in plans),
        "tokens": sum(plan.stage.tokens for plan in plans),
    }
