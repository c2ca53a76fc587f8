"""Where the time of a run went: one bar of all its parts, and a table."""

from __future__ import annotations

import html

from matplotlib.figure import Figure

from lcx.core.numbers import duration
from lcx.report import style
from lcx.report.page import table
from lcx.training import goodput
from lcx.training.goodput import Goodput

COLOURS = {
    goodput.STEP: style.AFTER,
    goodput.WASTED: style.BEFORE,
    goodput.RECOVERY: style.LOST,
}
"""Colours that say good and bad; the other parts have the colours of lines, in their order."""

SHORT = {
    goodput.STEP: "steps",
    goodput.DATA: "data",
    goodput.COMPILE: "compile",
    goodput.SAVE: "save",
    goodput.EVALUATION: "evaluation",
    goodput.REPORT: "report",
    goodput.INIT: "start",
    goodput.PREPARATION: "prepare",
    goodput.RESTORE: "restore",
    goodput.WASTED: "lost work",
    goodput.RECOVERY: "down",
}
"""Names of parts on the bar."""

LETTER = 0.008
"""The width of a letter as a share of the bar: a piece that is too narrow for its name goes without."""


@style.typography()
def bar(found: Goodput) -> Figure:
    """One bar over the whole time, a piece a part, in the order in which they happen in a step and then around it."""
    figure = style.new_figure(9.0, 1.1)
    axes = figure.subplots()
    left = 0.0
    for part, seconds in found.parts.items():
        share = seconds / found.wall
        colour = colour_of(part)
        axes.barh(0, share, left=left, height=0.8, color=colour, edgecolor=style.PAPER, linewidth=1.0)
        name = SHORT.get(part, part)
        if share > LETTER * (len(name) + 1):
            words = f"{name}\n{100 * share:.0f}%"
            axes.text(left + share / 2, 0, words, ha="center", va="center", fontsize=9, color=style.ink_on(colour))
        left += share
    axes.set_xlim(0, max(1.0, left))
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    return figure


def colour_of(part: str) -> str:
    """The colour of a part."""
    others = [name for name in goodput.PARTS if name not in COLOURS]
    return COLOURS.get(part) or style.LINES[others.index(part) % len(style.LINES) if part in others else -1]


def section(found: Goodput | None) -> str:
    """HTML of the table of parts; empty where a run left no record."""
    if found is None or not found.wall:
        return ""
    rows = [
        ((part.replace("_", " "), f"{seconds:,.1f}", f"{100 * seconds / found.wall:.1f}%", goodput.PARTS.get(part, "")), "")
        for part, seconds in found.parts.items()
    ]
    total = (("all", f"{found.wall:,.1f}", f"{100 * sum(found.parts.values()) / found.wall:.1f}%", ""), "strong")
    return f"<div class=words>{table(('part', 'seconds', 'share', 'what it is'), [*rows, total])}</div>"


def note(found: Goodput | None) -> str:
    """HTML of what the table does not say."""
    if found is None:
        return ""
    said = [f"Goodput is {100 * found.share:.1f}%: the time of steps that the run kept."]
    if found.processes > 1:
        again = f"; they did {sum(found.lost):,} steps again, {max(found.lost, default=0):,} at most" if found.lost else ""
        said.append(f"The run took {found.processes} processes one after the other{again}.")
    if found.rolled_back:
        said.append(f"The monitor rolled {found.rolled_back:,} steps back.")
    if found.paused:
        said.append(f"Not counted: {duration(found.paused)} between an end and a start by hand.")
    return html.escape(" ".join(said) + " Names are those of ml-goodput-measurement.")
