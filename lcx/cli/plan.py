"""What a config needs and how long it takes, before it runs: memory, transfers, time and cost on chips that need not be here.

lcx plan --config=configs/pods/llama3_8b_4m.py --topology=v5p:4x4x4 [--stage=to_1m] [--json] [--html=plan.html]
lcx plan --config=FILE --topology=v5e:16x16 --find=context|chips|mesh|strategy|remat
lcx plan --config=FILE --topology=v5e:16x16 --what_if=execution.remat=offload,mesh.ulysses=4

The step of the stage that needs most memory (or --stage) is compiled for the chips, which takes about a minute, 2 GiB and for TPUs
libtpu; --nocompile works everything out by arithmetic, as for GPUs, whose compiler needs one.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from absl import flags

from lcx.cli import config_flags
from lcx.core.configs import choice
from lcx.core.console import say, table, warn
from lcx.core.errors import UserError
from lcx.core.numbers import duration, size, step_time
from lcx.planning import plan as planning
from lcx.planning import search
from lcx.planning.compile import has_compiler
from lcx.planning.plan import StagePlan
from lcx.planning.topology import Topology, topology
from lcx.recipes.recipe import recipe
from lcx.training.stages import RunConfig


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values, workdir=False)
    flags.DEFINE_string(
        "topology", None, "chips, as in v5p:4x4x4, h100:8 or cpu:2 (default: what the config names)", flag_values=values
    )
    flags.DEFINE_integer("slices", 1, "how many such slices of TPU chips", flag_values=values)
    flags.DEFINE_string("stage", None, "stage to look at (default: the one that needs most memory)", flag_values=values)
    flags.DEFINE_bool("compile", True, "compile the stage's step for the chips; otherwise arithmetic alone", flag_values=values)
    flags.DEFINE_string("find", None, f"look for the best of {', '.join(get_args(search.Wanted))}", flag_values=values)
    flags.DEFINE_string(
        "what_if", None, "changes to compare with, as in execution.remat=offload,mesh.ulysses=4", flag_values=values
    )
    flags.DEFINE_string("html", None, "write a page with pictures to this file", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON instead of sentences and tables", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Print the plan."""
    run = recipe(config_flags.chosen(values, rest)).run
    where = topology(values.topology or getattr(config_flags.module(values), "TOPOLOGY", "cpu:1"), values.slices)
    if values.find is not None:
        choice("--find", values.find, get_args(search.Wanted))
    if values.html is not None:
        if values.find is not None:
            raise UserError("--html draws the plan of the config as it is, and --find looks for others; leave one of them out")
        if Path(values.html).is_dir():
            raise UserError(f"--html={values.html} is a directory; name a file in it, such as {Path(values.html) / 'plan.html'}")
    changes = parse_changes(values.what_if) if values.what_if is not None else {}
    other_run = planning.changed(run, changes) if changes else run
    index = planning.fullest(run, where) if values.stage is None else planning.stage_index(run, values.stage)
    compiles = values.compile and where.compiles
    if compiles and not values["compile"].present and not has_compiler(where):
        warn("libtpu is not installed, so that nothing is compiled and bytes are by arithmetic; install it with pip install libtpu")
        compiles = False
    found: dict[str, Any] = {"topology": str(where)}
    if values.find is not None:
        found["find"] = find(values.find, other_run, index, where, compiles, values.json)
    else:
        plans = whole(run, index, where, compiles)
        found |= {"stages": [planning.as_json(one) for one in plans], "total": planning.totals(plans)}
        if not values.json:
            show(plans, index)
        if not plans[index].fits:
            ways = search.advice(run, index, plans[index])
            found["advice"] = [as_row(one) for one in ways]
            if not values.json:
                candidates("to make it fit, the least slow first", ways)
        if changes:
            other = whole(other_run, index, where, compiles)
            found["what_if"] = {
                "changes": changes,
                "stages": [planning.as_json(one) for one in other],
                "total": planning.totals(other),
            }
            if not values.json:
                compare(values.what_if, plans, other, index)
        if values.html is not None:
            from lcx.report.plan_page import write_plan

            found["html"] = str(write_plan(Path(values.html), run, plans, index))
            if not values.json:
                say(f"page: {found['html']}")
    if values.json:
        print(json.dumps(found, indent=2))


def whole(run: RunConfig, index: int, where: Topology, compiles: bool) -> list[StagePlan]:
    """The plans of all stages, of which stage `index` may be compiled."""
    made = [planning.stage_plan(run, i, where) for i in range(len(run.stages))]
    if compiles:
        say(f"compiling stages.{run.stages[index].name} for {where}, about a minute (--nocompile plans by arithmetic)", stderr=True)
        made[index] = planning.compiled_plan(run, index, where)
    return made


def find(wanted: Any, run: RunConfig, index: int, where: Topology, compiles: bool, quiet: bool) -> list[dict[str, Any]]:
    """Look for the best of something, and compile what was found: as often as it takes for the compiler to agree that it fits."""
    ratio = 1.0
    for _ in range(4):
        found = search.find(wanted, run, index, where, ratio)
        if not compiles or not found[0].plan.fits:
            break
        best = found[0]
        checked = planning.compiled_plan(best.run, index, best.plan.where)
        found[0] = dataclasses.replace(best, plan=checked)
        ratio = checked.ratio
        if checked.fits:
            break
    if not quiet:
        how = "the first as compiled" if found[0].plan.compiled else "by arithmetic"
        candidates(f"--find={wanted} for stages.{run.stages[index].name} on {where}, {how}", found[:12])
    return [as_row(one) for one in found]


def parse_changes(text: str) -> dict[str, Any]:
    """`key=value,key=value` as a mapping; raises `UserError` for what is not written so."""
    found = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--what_if={text}: {item!r} is not key=value, as in execution.remat=offload,mesh.ulysses=4")
        try:
            found[key.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            found[key.strip()] = value.strip()
    return found


def show(plans: Sequence[StagePlan], index: int) -> None:
    """All of a plan: whether it fits, where the bytes go, what is sent, and what everything takes."""
    chosen = plans[index]
    say(planning.sentence(chosen))
    table(
        f"stages.{chosen.stage.name}: bytes of a device, by arithmetic, at their fullest: {chosen.held.moment}",
        ["for", "bytes", "share"],
        [[name, size(count), f"{count / chosen.held.total:.0%}"] for name, count in chosen.held.parts.items() if count],
    )
    if chosen.compiled is not None:
        compiled = chosen.compiled
        say(
            f"as compiled in {duration(compiled.seconds)}: {size(compiled.needed)} on a device, "
            f"{compiled.needed / chosen.held.total:.0%} of the arithmetic; {compiled.others / 1e15:,.1f} PFLOP outside of kernels"
        )
        table(
            "transfers of a step, as scheduled",
            planning.TRANSFER,
            [cells for cells, _ in planning.transfers(compiled)],
            left=3,
        )
    table(
        "stages, by the roofline (docs/pods.md says how well it does)",
        ["stage", "tokens a row", "fits", "needs", "step", "tokens/s", "MFU", "bound by", "steps", "time", "chip-hours"],
        [
            [
                one.stage.name, f"{one.stage.seq_len:,}", yes(one.fits), size(one.needed), step_time(one.time.seconds),
                f"{one.tokens / one.time.seconds:,.0f}", f"{one.time.mfu:.0%}", one.time.bound, f"{one.stage.steps:,}",
                duration(one.hours * 3600), f"{one.chip_hours:,.1f}",
            ]
            for one in plans
        ],
    )  # fmt: skip
    total = planning.totals(plans)
    cost = f"{duration(total['hours'] * 3600)} and {chip_hours(total['chip_hours'])} chip-hours"
    say(f"in all {cost} for {total['tokens']:,} tokens on {chosen.where}")


def chip_hours(hours: float) -> str:
    """A sum of them: whole from 100 on."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.1f}"


def yes(holds: bool) -> str:
    """The word for it."""
    return "yes" if holds else "no"


def candidates(title: str, found: Sequence[search.Candidate]) -> None:
    """A table of ways to run a stage."""
    table(
        title,
        ["what", "on", "fits", "needs", "host", "step", "MFU", "chip-hours"],
        [list(as_row(one).values()) for one in found],
        left=2,
    )


def as_row(one: search.Candidate) -> dict[str, str]:
    """A candidate's figures as text."""
    plan = one.plan
    return {
        "what": one.what,
        "on": str(plan.where),
        "fits": yes(plan.fits),
        "needs": size(plan.needed),
        "host": size(plan.host) if plan.host else "",
        "step": step_time(plan.time.seconds),
        "mfu": f"{plan.time.mfu:.0%}",
        "chip_hours": f"{plan.chip_hours:,.1f}",
    }


def compare(text: str, before: Sequence[StagePlan], after: Sequence[StagePlan], index: int) -> None:
    """A plan next to that of a changed config."""
    rows = []
    for name, plans in (("as it is", before), (text, after)):
        one, total = plans[index], planning.totals(plans)
        rows.append(
            [
                name, yes(one.fits), size(one.needed), size(one.host) if one.host else "", step_time(one.time.seconds),
                f"{one.time.mfu:.0%}", duration(total["hours"] * 3600), chip_hours(total["chip_hours"]),
            ]
        )  # fmt: skip
    table(
        f"what if, at stages.{before[index].stage.name}",
        ["config", "fits", "needs", "host", "step", "MFU", "all stages", "chip-hours"],
        rows,
    )
