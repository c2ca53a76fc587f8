"""The page of a plan: memory by context as stacked bars, the step as a timeline, and the figures of all stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.numbers import duration, size
from lcx.planning import plan as planning
from lcx.planning.memory import PARTS
from lcx.planning.plan import StagePlan
from lcx.planning.roofline import StepTime
from lcx.report import style
from lcx.report.page import page, picture, sections, table
from lcx.training.stages import RunConfig

COLOURS = dict(zip(PARTS, style.LINES, strict=False))
TIMES = {"products": style.LINES[0], "attention": style.LINES[1], "loss": style.LINES[2], "optimizer": style.LINES[3]}
SENT, WAITED = style.LINES[5], style.LOST

_FOOTER = "Written by lcx plan. Memory is by arithmetic unless it says as compiled; times are a roofline's, at published rates."


def write_plan(path: Path, run: RunConfig, plans: Sequence[StagePlan], index: int) -> Path:
    """Write the page of a run's plans, of which number `index` is shown in pictures; returns its path."""
    chosen = plans[index]
    total = planning.totals(plans)
    tiles = [
        (
            "memory of a device",
            size(chosen.needed),
            f"of {size(chosen.room)}, " + ("as compiled" if chosen.compiled else "by arithmetic"),
        ),
        ("a step", _seconds(chosen.time.seconds), f"bound by {chosen.time.bound}, MFU {chosen.time.mfu:.0%}"),
        ("tokens a second", f"{chosen.tokens / chosen.time.seconds:,.0f}", f"{chosen.stage.seq_len:,} tokens a row"),
        ("all stages", duration(total["hours"] * 3600), f"{total['chip_hours']:,.0f} chip-hours"),
    ]
    lengths = by_context(run, index, chosen)
    body = sections(
        [
            ("Memory by context", picture(style.png(memory_figure(lengths, chosen)), "memory by context"), _MEMORY),
            ("A step", picture(style.png(timeline_figure(chosen.time)), "a step as a timeline"), _STEP),
            ("Stages", stages_table(plans), ""),
            ("Transfers of a step, as compiled", transfers_table(chosen), _TRANSFERS),
        ]
    )
    name = f"{chosen.stage.name} on {chosen.where}"
    text = page(f"Plan: {name}", "What the run needs", planning.sentence(chosen) + ".", tiles, body, _FOOTER)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


_MEMORY = (
    "Bytes of a device at the fullest moment of a step, for rows of other lengths on the same mesh; the line is what there is."
)
_STEP = (
    "What devices compute, and below it what they send, in the order of a step with all layers of a kind together; what nothing is "
    "computed behind is red."
)
_TRANSFERS = (
    "Equal ones together, those of less than a megabyte left out. A hidden one is started before something is computed and awaited "
    "after it."
)


def by_context(run: RunConfig, index: int, chosen: StagePlan) -> list[StagePlan]:
    """Plans of the stage for lengths around its own, in powers of two, corrected by what the compiler said of its own."""
    name, own = chosen.stage.name, chosen.stage.seq_len
    found = []
    for shift in range(-6, 3):
        length = own << shift if shift >= 0 else own >> -shift
        changes = {f"stages.{name}.seq_len": length, f"stages.{name}.max_position": None}
        try:
            plan = planning.stage_plan(planning.changed(run, changes), index, chosen.where)
        except UserError:
            continue
        found.append(dataclasses.replace(plan, ratio=chosen.ratio))
    return found


@style.typography()
def memory_figure(plans: Sequence[StagePlan], chosen: StagePlan):
    """Stacked bars, one a length, with what there is as a line."""
    figure = style.new_figure(9.2, 4.4)
    axes = figure.subplots()
    places = range(len(plans))
    bottom = [0.0] * len(plans)
    for part in PARTS:
        heights = [plan.held.parts[part] * plan.ratio / 1e9 for plan in plans]
        axes.bar(places, heights, 0.68, bottom=bottom, color=COLOURS[part], label=part, zorder=2)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    room = chosen.room / 1e9
    axes.axhline(room, color=style.INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    axes.annotate(
        f"{room:,.1f} GB there are", (-0.45, room), xytext=(0, 4), textcoords="offset points", ha="left", va="bottom", fontsize=9
    )
    top = min(1.75 * room, max(1.02 * room, *bottom))
    for at, height in enumerate(bottom):
        inside = height <= top
        axes.annotate(
            f"{height:,.1f}", (at, min(height, top)), xytext=(0, 3 if inside else -4), textcoords="offset points", ha="center",
            va="bottom" if inside else "top", fontsize=9, color=style.INK if inside else style.PAPER, fontweight="bold", zorder=4,
        )  # fmt: skip
    axes.set_ylim(0, top * 1.08)
    axes.set_xlim(-0.6, len(plans) - 0.4)
    axes.set_xticks(list(places), [style.tokens(plan.stage.seq_len) for plan in plans])
    axes.get_xticklabels()[[plan.stage.seq_len for plan in plans].index(chosen.stage.seq_len)].set_fontweight("bold")
    axes.set_xlabel("tokens of a row")
    axes.set_ylabel("GB of a device")
    style.grid_lines(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, reverse=True)
    return figure


@style.typography()
def timeline_figure(time: StepTime):
    """Two lanes over the seconds of a step: what is computed, and what is sent."""
    figure = style.new_figure(9.2, 2.7)
    axes = figure.subplots()
    at, named = 0.0, set()
    for one in time.segments:
        computed, sent = one.times * one.compute, one.times * one.transfer
        if computed:
            label = None if one.part in named else one.part
            axes.broken_barh([(at, computed)], (1.1, 0.8), color=TIMES.get(one.part, style.MUTED), label=label, zorder=2)
            named.add(one.part)
        start = at if one.overlapped else at + computed
        hidden = min(sent, computed) if one.overlapped else 0.0
        if hidden:
            label = None if "sent behind it" in named else "sent behind it"
            axes.broken_barh([(start, hidden)], (0.1, 0.8), color=SENT, label=label, zorder=2)
            named.add("sent behind it")
        if sent > hidden:
            label = None if "waited for" in named else "waited for"
            axes.broken_barh([(start + hidden, sent - hidden)], (0.1, 0.8), color=WAITED, label=label, zorder=2)
            named.add("waited for")
        at += one.seconds
    axes.set_ylim(0, 2)
    axes.set_xlim(0, at)
    axes.set_yticks([0.5, 1.5], ["sent", "computed"])
    axes.set_xlabel("seconds")
    style.grid_lines(axes, "x")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    return figure


def stages_table(plans: Sequence[StagePlan]) -> str:
    """HTML of all stages' figures."""
    heads = ["stage", "tokens a row", "fits", "needs", "mesh", "remat", "step", "MFU", "bound by", "steps", "time", "chip-hours"]
    rows = [
        (
            [
                one.stage.name, style.tokens(one.stage.seq_len), "yes" if one.fits else "no", size(one.needed), _mesh(one.mesh),
                one.work.policy, _seconds(one.time.seconds), f"{one.time.mfu:.0%}", one.time.bound, f"{one.stage.steps:,}",
                duration(one.hours * 3600), f"{one.chip_hours:,.1f}",
            ],
            "" if one.fits else "dim",
        )
        for one in plans
    ]  # fmt: skip
    return table(heads, rows)


def transfers_table(plan: StagePlan) -> str:
    """HTML of what a compiled step sends; empty where nothing was compiled."""
    if plan.compiled is None:
        return ""
    rows = [(cells, "dim" if hidden else "") for cells, hidden in planning.transfers(plan.compiled)]
    return table(planning.TRANSFER, rows)


def _mesh(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis} {count}" for axis, count in mesh.items() if count > 1) or "1"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)
