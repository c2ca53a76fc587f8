"""How lcx's pictures look: type, colours, number formats, and labels that stand at the end of their line."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import matplotlib.transforms
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1D2733"
MUTED = "#66727F"
FAINT = "#DDE2E8"
PAPER = "#FFFFFF"
LOST, HALF, FOUND = "#F0496E", "#EBB839", "#0CD79F"
SCORES = matplotlib.colors.LinearSegmentedColormap.from_list("found", [LOST, HALF, FOUND])
BEFORE, AFTER = "#D6335A", "#0A9A76"
CONTEXT = "context length, tokens"
"""What every picture calls the number of tokens that a model is given."""
LINES = ("#2B62C9", "#C77A12", "#7D4FC4", "#0E8FA8", "#B23A7A", "#5E7A1F", "#8A5A3C", "#3F4E9E")

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 5,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "mathtext.default": "regular",
}


@contextlib.contextmanager
def typography() -> Iterator[None]:
    """The rc settings under which every figure is built and saved; restored on leaving."""
    with matplotlib.rc_context(_RC):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` inches on the Agg canvas, outside pyplot's global list."""
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write the figure as PNG at 200 dots per inch."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path


def png(figure: Figure) -> bytes:
    """The figure as PNG at 200 dots per inch."""
    buffer = io.BytesIO()
    with typography():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": "lcx"})
    return buffer.getvalue()


def tokens(length: float) -> str:
    """`256`, `4K`, `1M`: lengths in powers of two as people say them; others in full."""
    length = int(length)
    for size, unit in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"


def number(value: float) -> str:
    """Three significant digits without an exponent where that stays short: `0.012`, `4.31`, `23.5K`, `3.58B`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / size * (10 if unit == 'K' else 1):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ink_on(background: Any) -> str:
    """The colour of text that is read on a background of any matplotlib colour."""
    red, green, blue = matplotlib.colors.to_rgb(background)
    return PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 0.53 else INK


def grid_lines(axes: Axes, axis: str = "y") -> None:
    """Hair lines behind the data, along one axis."""
    axes.grid(True, axis=axis, color=FAINT, linewidth=0.7, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def length_axis(axes: Axes, lengths: Sequence[int], label: str = CONTEXT) -> None:
    """A base-2 logarithmic x axis with one tick for each length, thinned to at most nine."""
    axes.set_xscale("log", base=2)
    shown = list(lengths)[:: -(-len(lengths) // 9)]
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([float(x) for x in shown]))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: tokens(round(x))))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel(label)


def bar_edges(axes: Axes, edges: Sequence[str], label: str, most: int = 12) -> None:
    """An x axis of bars at 0, 1, ...: a tick with its name where one bar ends and the next begins, thinned to at most so many.

    The first bar has all below the first edge, the last one all from the last edge on. Leaves room above the tallest bar.
    """
    step = max(1, -(-len(edges) // most))
    shown = range((len(edges) - 1) % step, len(edges), step)
    axes.set_xticks([i + 0.5 for i in shown], [edges[i] for i in shown], fontsize=8.5)
    axes.tick_params(axis="x", length=3.5, width=0.8, pad=3, color=MUTED)
    axes.set_xlim(-0.6, len(edges) + 0.6)
    axes.set_xlabel(label)
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1.0)


def value_axis(axes: Axes, low: float, high: float, label: str) -> None:
    """A y axis over `low`..`high`: linear, or logarithmic with plain numbers when the values span more than a factor of four."""
    if low > 0 and high > 4 * low:
        axes.set_yscale("log")
        span = high / low
        steps = (1, 1.5, 2, 3, 4, 5, 7) if span < 12 else (1, 2, 5) if span < 300 else (1,)
        ticks = [m * 10.0**e for e in range(-6, 16) for m in steps]
        ticks = [t for t in ticks if low / 1.3 <= t <= high * 1.3]
        axes.yaxis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    else:
        room = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: number(y)))
    axes.set_ylabel(label)


def share_axis(axes: Axes) -> None:
    """The y axis of shares from 0 to 1, in percent."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")


def mark_trained(axes: Axes, trained: int | None, text: str = "trained at") -> None:
    """A dashed upright at the trained length with its name at the top."""
    if trained is None:
        return
    axes.axvline(trained, color=INK, linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
    axes.annotate(
        f"{text} {tokens(trained)}", (trained, 1.0), xycoords=("data", "axes fraction"), xytext=(5, -3), textcoords="offset points",
        ha="left", va="top", fontsize=9, color=INK,
    )  # fmt: skip


LABEL_GAP, LABEL_EDGE, LABEL_LEAD = 13.0, 7.0, 24.0
"""Points between the middles of neighbouring labels, from the frame's edge to a label, and at least from a line's end to one."""


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 9.5) -> None:
    """Name lines at their right ends: `(x, y, text, colour)` in data units; call it when the limits of the axes are final.

    The names of the lines that end furthest to the right stand in a column beside the frame, those of the others beside their
    ends. Names stay within the frame's height; where one had to move to leave room for its neighbours, thin lines in the colours
    of its column lead from the lines' ends to their names.
    """
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    axes.get_xlim()  # settles the limits, on which the transforms below depend
    box, sheet = axes.get_position(), axes.figure.bbox
    wide, tall = (72 / axes.figure.dpi * side for side in (box.width * sheet.width, box.height * sheet.height))
    gap = LABEL_GAP / tall * size / 9.5

    def place(y: float) -> float:
        height = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return min(1.0, max(0.0, height))

    def shifted(transform: Any, points: float) -> Any:
        return transform + matplotlib.transforms.ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)

    for at in dict.fromkeys(end[0] for end in ends):
        here = sorted((place(y), y, text, colour) for x, y, text, colour in ends if x == at)
        apart = min(gap, 1 / len(here))
        heights = spread([end[0] for end in here], apart, apart / 2)
        moved = any(abs(height - end[0]) > 0.2 * gap for height, end in zip(heights, here, strict=True))
        last, lead = at == max(end[0] for end in ends), LABEL_LEAD if moved else LABEL_EDGE
        room = wide * (1 - axes.transLimits.transform(axes.transScale.transform((at, low)))[0]) if last else 0.0
        column = shifted(axes.transAxes if last else axes.get_xaxis_transform(), max(LABEL_EDGE, lead - room))
        for height, (_, y, text, colour) in zip(heights, here, strict=True):
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
            axes.annotate(
                text, (at, y), xytext=(1.0 if last else at, height), textcoords=column, ha="left", va="center", fontsize=size,
                color=colour, fontweight="bold", annotation_clip=False, arrowprops=line if moved else None,
            )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, margin: float = 0.0) -> list[float]:
    """The sorted heights moved as little as is needed (least squares) to stand `gap` apart, and `margin` from 0 and 1."""
    blocks: list[list[float]] = []  # each [sum of (wanted - offset), count]: pooled neighbours that touch
    for i, height in enumerate(wanted):
        blocks.append([height - i * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    means = [total / count for total, count in blocks for _ in range(int(count))]
    most = 1.0 - margin - (len(wanted) - 1) * gap
    return [min(max(mean, margin), most) + i * gap for i, mean in enumerate(means)]
