"""What a mixture holds, as a picture of `lcx.data.report`'s report."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcx.data.report import PartReport, Report
from lcx.report import style


def mixture(report: Report) -> Figure:
    """Documents by length, tokens by length, and the share of tokens by part, a colour a part."""
    with style.typography():
        drawing = style.new_figure(11.5, 3.8)
        left, middle, right = drawing.subplots(1, 3, width_ratios=(5, 5, 4))
        colours = [style.LINES[i % len(style.LINES)] for i in range(len(report.parts))]
        _by_length(left, report, [part.documents_by_length for part in report.parts], colours, "Documents by length")
        _by_length(middle, report, [part.tokens_by_length for part in report.parts], colours, "Tokens by length of their document")
        _shares(right, report.parts, report.token_shares(), colours)
        right.set_title("Share of tokens")
        right.set_xlabel(f"rows of {style.tokens(report.seq_len)}, {report.fill_ratio:.1%} filled")
    return drawing


def _by_length(axes: Axes, report: Report, counts: list[tuple[int, ...]], colours: list[str], title: str) -> None:
    bottom = np.zeros(len(report.bins()))
    for values, colour in zip(counts, colours, strict=True):
        axes.bar(np.arange(len(values)), values, bottom=bottom, color=colour, width=0.84, zorder=2)
        bottom += values
    style.grid_lines(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.number(y)))
    # A bar is named by its shortest length: the next one's is where it ends.
    axes.set_xticks(range(len(bottom)), [style.tokens(low) for low in report.edges[:-1]], fontsize=8.5, rotation=45)
    axes.set_xlabel("length from, tokens")
    axes.set_title(title)


def _shares(axes: Axes, parts: tuple[PartReport, ...], shares: dict[str, float], colours: list[str]) -> None:
    places = range(len(parts))
    axes.barh(places, list(shares.values()), color=colours, height=0.62, zorder=2)
    for place, share in enumerate(shares.values()):
        axes.annotate(f"{share:.1%}", (share, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_xlim(0, 1.15)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100%"])
    axes.set_yticks(places, list(shares))
    axes.spines["left"].set_visible(False)
    style.grid_lines(axes, "x")
