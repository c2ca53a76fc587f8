"""What a mixture holds, as pictures of `lcx.data.report`'s report: a colour a part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcx.data.report import Report
from lcx.report import style

PANEL = 4.8
"""Inches across of a picture that stands beside another one."""


def mixture(report: Report) -> Figure:
    """Documents by length, tokens by length, and the share of tokens by part."""
    with style.typography():
        drawing = style.new_figure(11.5, 3.8)
        left, middle, right = drawing.subplots(1, 3, width_ratios=(5, 5, 4))
        _by_length(left, report, "documents")
        _by_length(middle, report, "tokens")
        _shares(right, report)
    return drawing


@style.typography()
def by_length(report: Report, what: str) -> Figure:
    """`documents` or `tokens` by length of the document."""
    figure = style.new_figure(PANEL, 3.4)
    _by_length(figure.subplots(), report, what)
    names = [part.name for part in report.parts]
    axes = figure.axes[0]
    figure.legend(axes.containers, names, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


@style.typography()
def shares(report: Report) -> Figure:
    """The share of tokens by part."""
    figure = style.new_figure(PANEL, 1.3 + 0.34 * len(report.parts))
    _shares(figure.subplots(), report)
    return figure


@style.typography()
def over_stage(names: Sequence[str], tenths: Sequence[tuple[int, int, np.ndarray]]) -> Figure:
    """The share of rows by part in each tenth of a stage: first and last step with the shares float64 `[P]`."""
    figure = style.new_figure(PANEL, 3.4)
    axes, bottom = figure.subplots(), np.zeros(len(tenths))
    middles = [(first + last) / 2 for first, last, _ in tenths]
    widths = [0.9 * (last - first + 1) for first, last, _ in tenths]
    for i, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        heights = [shares[i] for _, _, shares in tenths]
        axes.bar(middles, heights, width=widths, bottom=bottom, color=colour, label=name, zorder=2)
        bottom += heights
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100%"])
    axes.set_xlabel("step")
    axes.set_title("Share of rows over the stage")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _colours(count: int) -> list[str]:
    return [style.LINES[i % len(style.LINES)] for i in range(count)]


def _by_length(axes: Axes, report: Report, what: str) -> None:
    bottom = np.zeros(len(report.bins()))
    for part, colour in zip(report.parts, _colours(len(report.parts)), strict=True):
        values = part.documents_by_length if what == "documents" else part.tokens_by_length
        axes.bar(np.arange(len(values)), values, bottom=bottom, color=colour, width=0.84, zorder=2)
        bottom += values
    style.grid_lines(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.number(y)))
    style.bar_edges(axes, [style.tokens(edge) for edge in report.edges[1:-1]], "length of the document, tokens")
    axes.set_title("Documents by length" if what == "documents" else "Tokens by length of their document")


def _shares(axes: Axes, report: Report) -> None:
    shares = report.token_shares()
    places = range(len(shares))
    axes.barh(places, list(shares.values()), color=_colours(len(shares)), height=0.62, zorder=2)
    for place, share in enumerate(shares.values()):
        axes.annotate(f"{share:.1%}", (share, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_xlim(0, 1.15)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100%"])
    axes.set_yticks(places, list(shares))
    axes.spines["left"].set_visible(False)
    style.grid_lines(axes, "x")
    axes.set_title("Share of tokens")
    axes.set_xlabel(f"rows of {style.tokens(report.seq_len)}, {report.fill_ratio:.1%} filled")
