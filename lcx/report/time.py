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

NAMED = 0.06
"""The share of the bar from which a part has its name on it; smaller ones are in the table alone."""


def bar(found: Goodput) -> Figure:
    """One bar over the whole time, a piece a part, in the order in which they happen in a step and then around it."""
    figure = style.new_figure(8.4, 1.25)
    axes = figure.subplots()
    left = 0.0
    for part, seconds in found.parts.items():
        share = seconds / found.wall
        colour = colour_of(part)
        axes.barh(0, share, left=left, height=0.8, color=colour, edgecolor=style.PAPER, linewidth=1.0)
        if share >= NAMED:
            axes.text(
                left + share / 2, 0, f"{_words(part, share)}\n{100 * share:.0f}%", ha="center", va="center", fontsize=9,
                color=style.ink_on(colour),
            )  # fmt: skip
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


def _words(part: str, share: float) -> str:
    """The name of a part, on two lines where the piece is narrow."""
    return part.replace("_", " " if share > 0.16 else "\n")


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
