"""What fits, and what is fastest of it: the longest rows, the fewest chips, the best mesh, strategy and policy, by arithmetic.

Where a compiler has been asked, what it says corrects the arithmetic (`ratio`), and what is found is compiled again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_type_hints

from lcx.core.errors import UserError
from lcx.model.execution import ExecutionConfig
from lcx.planning.plan import StagePlan, changed, room, stage_plan
from lcx.planning.topology import Topology, shapes
from lcx.training.stages import RunConfig

Wanted = Literal["context", "chips", "mesh", "strategy", "remat"]

STEP = 65_536
"""Lengths that are looked for are multiples of so many tokens, and of what the mesh divides rows by."""

LONGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a stage: what is changed, of which run, and the plan after it."""

    what: str
    before: RunConfig
    changes: dict[str, Any]
    plan: StagePlan

    @property
    def run(self) -> RunConfig:
        """The changed run."""
        return changed(self.before, self.changes)


def find(wanted: Wanted, run: RunConfig, index: int, where: Topology, ratio: float = 1.0) -> list[Candidate]:
    """Candidates, those that fit first and of these the best; `ratio` corrects what arithmetic says of memory.

    Raises `UserError` if there is none.
    """
    makers: dict[str, Callable[[], Iterator[Candidate]]] = {
        "context": lambda: iter(longest(run, index, where, ratio)),
        "chips": lambda: fewest_chips(run, index, where, ratio),
        "mesh": lambda: meshes(run, index, where, ratio),
        "strategy": lambda: strategies(run, index, where, ratio),
        "remat": lambda: policies(run, index, where, ratio),
    }
    found = list(makers[wanted]())
    if not found:
        raise UserError(f"--find={wanted}: nothing divides over {where}; try other sizes of the mesh or of the batch")
    if wanted == "context":
        return found
    best = {"chips": lambda one: (one.plan.where.chips, one.plan.time.seconds)}.get(wanted, lambda one: (one.plan.time.seconds,))
    return sorted(found, key=lambda one: (not one.plan.fits, *best(one)))


def trial(run: RunConfig, index: int, where: Topology, what: str, changes: dict[str, Any], ratio: float) -> Candidate | None:
    """The stage with changes; None where they do not go together."""
    try:
        if all(key.startswith("mesh.") for key in changes):
            # Building a run takes far longer than its plan, and a mesh is not built into it.
            sizes = {key.removeprefix("mesh."): value for key, value in changes.items()}
            plan = stage_plan(run, index, where, mesh_config=dataclasses.replace(run.mesh_of(run.stages[index]), **sizes))
        else:
            plan = stage_plan(changed(run, changes), index, where)
    except UserError:
        return None
    return Candidate(what, run, changes, dataclasses.replace(plan, ratio=ratio))


def longest(run: RunConfig, index: int, where: Topology, ratio: float = 1.0) -> list[Candidate]:
    """The longest rows that fit, with as few of them as the mesh takes at once, and the next length that does not.

    Raises `UserError` if not even the shortest fits.
    """
    mesh = run.mesh_of(run.stages[index]).sizes(where.devices)
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    name = run.stages[index].name
    unit = STEP
    while unit % (2 * mesh["ring"] * mesh["ulysses"]):
        unit *= 2
        if unit > LONGEST:
            raise UserError(
                f"--find=context: rows do not divide over mesh.context={mesh['ring'] * mesh['ulysses']}; use a power of two"
            )

    def at(units: int) -> Candidate | None:
        length = units * unit
        changes = {"seq_len": length, "max_position": None, "batch_size": rows, "accumulate": 1}
        return trial(run, index, where, f"{length:,} tokens", {f"stages.{name}.{key}": x for key, x in changes.items()}, ratio)

    low, high = 0, 1
    while high * unit <= LONGEST and (one := at(high)) is not None and one.plan.fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        one = at(middle)
        low, high = (middle, high) if one is not None and one.plan.fits else (low, middle)
    found = [one for units in (low, high) if units and (one := at(units)) is not None]
    if not low:
        need = f", which need {found[0].plan.needed / 1e9:,.1f} GB of {room(where) / 1e9:,.1f}" if found else ""
        raise UserError(
            f"--find=context: not even rows of {unit:,} tokens fit {where}{need}; try --what_if=execution.remat=block or more chips"
        )
    return found


def meshes(run: RunConfig, index: int, where: Topology, ratio: float = 1.0) -> Iterator[Candidate]:
    """Every split of the devices between rows, tokens, heads and tensors that the stage divides over."""
    count = where.devices
    for context in _divisors(count):
        for ulysses in _divisors(context):
            for tensor in (n for n in _divisors(count // context) if n <= 8):
                changes = {"data": 1, "fsdp": -1, "expert": 1, "tensor": tensor, "context": context, "ulysses": ulysses}
                what = f"fsdp={count // context // tensor} tensor={tensor} context={context} ulysses={ulysses}"
                made = trial(run, index, where, what, {f"mesh.{axis}": size for axis, size in changes.items()}, ratio)
                if made is not None:
                    yield made


def fewest_chips(run: RunConfig, index: int, where: Topology, ratio: float = 1.0, above: int = 0) -> Iterator[Candidate]:
    """The fastest mesh that fits on each slice of the chip of more than `above` chips, from small to large, up to the first one."""
    for shape in shapes(where.name):
        other = Topology(where.name, shape)
        if other.chips <= above:
            continue
        found = sorted(meshes(run, index, other, ratio), key=lambda one: (not one.plan.fits, one.plan.time.seconds))
        if found:
            best = found[0]
            yield dataclasses.replace(best, what=f"{other}, {best.what}")
            if best.plan.fits:
                return


def strategies(run: RunConfig, index: int, where: Topology, ratio: float = 1.0) -> Iterator[Candidate]:
    """How devices that share a row share its keys: ring or all-gather, after an exchange of heads or without."""
    mesh = run.mesh_of(run.stages[index]).sizes(where.devices)
    context = mesh["ring"] * mesh["ulysses"]
    for ulysses in _divisors(context):
        for strategy in ("ring", "gather") if ulysses < context else ("auto",):
            name = f"{strategy} over {context // ulysses}" if ulysses < context else "heads alone"
            changes = {"mesh.ulysses": ulysses, "mesh.context": context, "execution.context_strategy": strategy}
            if made := trial(run, index, where, f"{name}, ulysses={ulysses}", changes, ratio):
                yield made


def policies(run: RunConfig, index: int, where: Topology, ratio: float = 1.0) -> Iterator[Candidate]:
    """What layers keep for the backward pass."""
    for policy in get_args(get_type_hints(ExecutionConfig)["remat"]):
        if policy != "auto" and (made := trial(run, index, where, f"execution.remat={policy}", {"execution.remat": policy}, ratio)):
            yield made


def advice(run: RunConfig, index: int, plan: StagePlan) -> list[Candidate]:
    """What would make a stage that does not fit fit, the change that costs least time a token first; of more chips only the fewest.

    Each with the plan after the change.
    """
    where, name = plan.where, plan.stage.name
    found = list(policies(run, index, where, plan.ratio))
    stage = plan.stage
    rows = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["expert"]
    if stage.batch_size // stage.accumulate > rows:
        made = trial(
            run, index, where, f"stages.{name}.accumulate={stage.batch_size // rows}",
            {f"stages.{name}.accumulate": stage.batch_size // rows}, plan.ratio,
        )  # fmt: skip
        found += [made] if made else []
    found += [dataclasses.replace(one, what=f"mesh: {one.what}") for one in meshes(run, index, where, plan.ratio)]
    fitting = sorted((one for one in found if one.plan.fits), key=lambda one: one.plan.time.seconds)
    larger = [one for one in fewest_chips(run, index, where, plan.ratio, where.chips) if one.plan.fits]
    return [*fitting[:4], *larger]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
