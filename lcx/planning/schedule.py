"""What a compiled program sends between devices, read from its text: how often, how much, along which axes, and behind what.

XLA writes the instructions of each computation in the order in which they run. A transfer in two parts, of which the first starts
it and the second waits for it, is hidden if something is computed between the two.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_NAMED = r"%?([\w.\-]+)"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer of a program.

    `kind` as XLA names it; the mesh `axes` along which devices take part; `size` in bytes on a device before or after, whichever is
    larger; `times` that it runs in a step; whether the schedule hides it; the `part` of the step that it serves.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    times: int
    hidden: bool
    part: str = "others"

    @property
    def bytes(self) -> int:
        """Of a step."""
        return self.size * self.times


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    operation: str
    type: str
    operands: tuple[str, ...]
    line: str

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        found = re.findall(rf"(?:body|condition|calls|to_apply)={_NAMED}", self.line)
        for several in re.findall(r"branch_computations=\{([^}]*)\}", self.line):
            found += re.findall(_NAMED, several)
        return found

    def named(self, attribute: str) -> str:
        """What follows an attribute's name; empty without it."""
        found = re.search(rf"{attribute}={_NAMED}", self.line)
        return found[1] if found else ""


Computations = Mapping[str, Sequence[Instruction]]


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program's text, and the name of the one that it begins with."""
    found: dict[str, list[Instruction]] = {}
    here: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if opened := re.match(rf"(ENTRY )?{_NAMED} .*\{{$", line):
            here = found.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif held := re.match(rf"\s+(?:ROOT )?{_NAMED} = (.*?[\])}}]) ([a-z][a-z\-]*)\(([^)]*)\)", line):
            name, kind, operation, operands = held.groups()
            here.append(Instruction(name, operation, kind, tuple(re.findall(r"%([\w.\-]+)", operands)), line))
    return found, entry


def read_schedule(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The transfers of a compiled program over a mesh (axis to size, in order), equal ones together, the largest first."""
    program, entry = computations(text)
    found: dict[Collective, int] = {}
    for name, times in _runs(program, entry).items():
        for one in _collectives(program, program[name], mesh):
            found[one] = found.get(one, 0) + times
    counted = [dataclasses.replace(one, times=times) for one, times in found.items()]
    return sorted(counted, key=lambda one: -one.bytes)


def _runs(program: Computations, entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for one in program[name]:
            if _collective_of(program, one) is None:
                trips = _trips(program, one) if one.operation == "while" else 1
                for inner in one.called:
                    if inner in program:
                        visit(inner, count * trips)

    if entry in program:
        visit(entry, 1)
    return times


def _trips(program: Computations, loop: Instruction) -> int:
    """How often a loop runs: as its text says, or the limit that its counter is compared with over the counter's step; else 1."""
    if found := re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.line):
        return int(found[1])
    condition, body = program.get(loop.named("condition"), ()), program.get(loop.named("body"), ())
    compared = next((one for one in condition if one.operation == "compare" and "direction=LT" in one.line), None)
    if compared is None or not body:
        return 1
    limit, place = _constant(condition, compared.operands[1]), _element(condition, compared.operands[0])
    if limit is None or place is None:
        return 1
    step = 1
    if body[-1].operation == "tuple" and place < len(body[-1].operands):
        next_ = next((one for one in body if one.name == body[-1].operands[place]), None)
        if next_ is not None and next_.operation == "add":
            step = next((found for name in next_.operands if (found := _constant(body, name))), 1)
    return max(1, -(-limit // step))


def _constant(steps: Sequence[Instruction], name: str) -> int | None:
    line = next((one.line for one in steps if one.name == name), "")
    found = re.search(r" constant\((\d+)\)", line)
    return int(found[1]) if found else None


def _element(steps: Sequence[Instruction], name: str) -> int | None:
    line = next((one.line for one in steps if one.name == name and one.operation == "get-tuple-element"), "")
    found = re.search(r" index=(\d+)", line)
    return int(found[1]) if found else None


def _collectives(program: Computations, steps: Sequence[Instruction], mesh: Mapping[str, int]) -> Iterator[Collective]:
    done = {operand: at for at, step in enumerate(steps) if _is_done(step) for operand in step.operands}
    for at, step in enumerate(steps):
        inner = _collective_of(program, step)
        if inner is None or _is_done(step):
            continue
        kind = next(kind for kind in KINDS if inner.operation.startswith(kind))
        if kind == "all-reduce" and "reduce-scatter" in step.line.split(" = ")[0] + " ".join(step.called):
            kind = "reduce-scatter"
        axes = _axes(inner.line, mesh)
        if not axes:
            continue
        end = done.get(step.name)
        hidden = "async-collective-fusion" in step.name or (
            end is not None and any(_computes(program, between) for between in steps[at + 1 : end])
        )
        # A transfer within a fusion has its operands there, and is hidden by what the fusion computes besides.
        around = steps if inner is step else [one for name in step.called for one in program.get(name, ())]
        hidden = hidden or (step.operation == "fusion" and _computes(program, step))
        size = max([_size(inner.type), *(_size(x.type) for x in around if x.name in inner.operands)])
        yield Collective(kind, axes, size, 1, hidden, _part(step.line))


def _collective_of(program: Computations, step: Instruction) -> Instruction | None:
    """The transfer that an instruction is, or wraps: alone in what it calls."""
    if step.operation.startswith(KINDS):
        return step
    if step.operation in ("async-start", "fusion", "call"):
        for name in step.called:
            inside = [one for one in program.get(name, ()) if one.operation.startswith(KINDS)]
            if inside:
                return inside[0]
    return None


def _is_done(step: Instruction) -> bool:
    return step.operation.endswith("-done")


def _computes(program: Computations, step: Instruction) -> bool:
    """Whether an instruction is worth hiding something behind: a product, a kernel, a loop."""
    if step.operation in ("dot", "convolution", "while") or "tpu_custom_call" in step.line:
        return True
    if step.operation not in ("fusion", "call", "conditional"):
        return False
    return any(_computes(program, inner) for name in step.called for inner in program.get(name, ()))


def _part(line: str) -> str:
    """The part of the step that an instruction comes from, by the names that the code gives to its scopes."""
    found = re.search(r'op_name="([^"]*)"', line)
    names = re.findall(r"\b(attention|mlp|loss|optimizer)\b", found[1]) if found else []
    return names[-1] if names else "others"


def _size(text: str) -> int:
    """Bytes of the largest array of a type."""
    sizes = [
        _BYTES.get(kind, 4) * math.prod(int(x) for x in shape.split(",") if x)
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    ]
    return max(sizes, default=0)


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; those of size 1 never do."""
    shape = list(mesh.values())
    varying: set[int] = set()
    for group in _groups(line, math.prod(shape)):
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        varying |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(axis for i, axis in enumerate(mesh) if i in varying)


def _groups(line: str, devices: int) -> list[list[int]]:
    """Groups of devices that exchange something: of each kind of notation the first few, which are like the others."""
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return [[int(x) for x in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        along = re.findall(r"'([^']+)'", found[2])
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        last = [i for i, name in enumerate(sizes) if name in along]
        ids = np.moveaxis(ids, last, range(ids.ndim - len(last), ids.ndim))
        return ids.reshape(-1, math.prod(sizes[name] for name in along))[:4].tolist()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        rows, columns = int(found[1]), int(found[2])
        ids = np.arange(rows * columns).reshape([int(x) for x in found[3].split(",")])
        if found[4]:
            ids = ids.transpose([int(x) for x in found[4].split(",")])
        return ids.reshape(rows, columns)[:4].tolist()
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])][:4]
    return [list(range(devices))] if "replica_groups={}" in line else []
