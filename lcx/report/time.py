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

LETTER = 0.0078
"""The width of a letter as a share of the bar: a piece that is too narrow for its name has it above the bar."""


@style.typography()
def bar(found: Goodput) -> Figure:
    """One bar over the whole time, a piece a part, in the order in which they happen in a step and then around it.

    Every piece has its name and share: in it where there is room, else above the bar at the end of a thin line.
    """
    pieces, left, narrow = [], 0.0, []
    total = max(1.0, sum(found.parts.values()) / found.wall)
    for part, seconds in found.parts.items():
        share = seconds / found.wall
        words = f"{SHORT.get(part, part)}\n{_percent(share)}"
        pieces.append((left, share, words, colour_of(part)))
        if share < LETTER * total * (_width(words) + 1):
            narrow.append(pieces[-1])
        left += share
    figure = style.new_figure(9.0, 1.8 if narrow else 1.3)
    axes = figure.subplots()
    for left, share, words, colour in pieces:
        axes.barh(0, share, left=left, height=0.8, color=colour, edgecolor=style.PAPER, linewidth=0.5)
        if (left, share, words, colour) not in narrow:
            axes.text(left + share / 2, 0, words, ha="center", va="center", fontsize=9, color=style.ink_on(colour))
    gap = min(LETTER * (max((_width(words) for _, _, words, _ in narrow), default=0) + 1), 1 / max(len(narrow), 1))
    middles = [(left + share / 2) / total for left, share, *_ in narrow]
    for place, middle, (_, _, words, colour) in zip(style.spread(middles, gap, gap / 2), middles, narrow, strict=True):
        axes.annotate(
            words, (middle * total, 0.4), xytext=(place * total, 0.75), ha="center", va="bottom", fontsize=9, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (0.5, 0)},
        )  # fmt: skip
    axes.set_xlim(0, total)
    axes.set_ylim(-0.45, 1.5 if narrow else 0.45)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_title(f"Where the time went: {duration(found.wall)}")
    return figure


def _width(words: str) -> int:
    """Letters of the longest line."""
    return max(map(len, words.split("\n")))


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.0095 else f"{100 * share:.1f}%" if share >= 0.0005 else "<0.1%"


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


def slow_steps(found: Goodput | None) -> str:
    """HTML of the table of steps that took much longer than others; empty where there are none."""
    if found is None or not found.slow:
        return ""
    rows = []
    for one in found.slow:
        numbers = (f"{x:,.1f}" for x in (one.took, one.usual, one.late, one.data))
        rows.append(((f"{one.step:,}", *numbers, one.process), ""))
    return table(("slow step", "seconds", "usual", "ready late by", "waiting for data", "who was ready last"), rows)


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
