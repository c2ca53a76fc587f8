"""The picture of a sweep: a heatmap over two settings, or lines over one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.colors
import numpy as np
from matplotlib.figure import Figure

from lcx.report import style

METRICS = ("needles", "perplexity", "loss")
LENGTH = "evaluation length"
_LOW_IS_GOOD = matplotlib.colors.LinearSegmentedColormap.from_list("low", ["#2B62C9", "#9DB9EA", "#F3F5F8"])


@dataclasses.dataclass(frozen=True)
class PointResult:
    """One point of a sweep: `status` is finished or failed (with the `reason`); `numbers` hold scalars and by-length tables."""

    name: str
    overrides: dict[str, Any]
    status: str
    reason: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """The numbers that are not tables."""
        return {key: float(value) for key, value in self.numbers.items() if isinstance(value, int | float)}


@style.typography()
def figure(results: Sequence[PointResult], metric: str | None = None) -> Figure | None:
    """`metric` over what was swept: one setting against evaluation length where it was measured by length, else two settings.

    One numeric setting alone gives a line; two of which few combinations were run (theta around each length's critical base)
    give a line for each length. None when no point is finished or none has the metric.
    """
    done = [result for result in results if result.status == "finished"]
    metric = metric or next((name for name in METRICS if any(name in result.scalars() for result in done)), None)
    done = [result for result in done if metric in result.scalars()]
    if metric is None or not done:
        return None
    swept = [
        path for path in dict.fromkeys(p for r in done for p in r.overrides) if len({str(r.overrides.get(path)) for r in done}) > 1
    ]
    by_length = all(isinstance(r.numbers.get(f"{metric}_by_length"), dict) for r in done)
    if len(swept) <= 1 and by_length:
        path = swept[0] if swept else next(iter(done[0].overrides), "point")
        cells = [((int(n), r.overrides.get(path, r.name)), v) for r in done for n, v in r.numbers[f"{metric}_by_length"].items()]
        return _heatmap(cells, LENGTH, path, metric)
    if len(swept) == 1 and all(_is_number(r.overrides.get(swept[0])) for r in done):
        return _lines({"": [(float(r.overrides[swept[0]]), r.scalars()[metric]) for r in done]}, swept[0], metric)
    if len(swept) >= 2:
        y, x = sorted(swept[:2], key=lambda path: ("seq_len" in path or "length" in path, swept.index(path)))
        cells = [((r.overrides.get(x), r.overrides.get(y)), r.scalars()[metric]) for r in done]
        filled = len({key for key, _ in cells}) / (len({key[0] for key, _ in cells}) * len({key[1] for key, _ in cells}))
        if filled < 0.6 and all(_is_number(key[1]) for key, _ in cells):
            lines = {
                at: [(float(key[1]), value) for key, value in cells if key[0] == at] for at in _ordered(k[0] for k, _ in cells)
            }
            return _lines({f"{_short(x)} {_label(at, x)}": points for at, points in lines.items()}, y, metric)
        return _heatmap(cells, x, y, metric)
    return _heatmap([((metric, r.name), r.scalars()[metric]) for r in done], "", "", metric)


def _heatmap(cells: Sequence[tuple[tuple[Any, Any], float]], x: str, y: str, metric: str) -> Figure:
    """Means of the cells' values (over seeds and whatever else was swept), printed and coloured."""
    columns, rows = _ordered(key[0] for key, _ in cells), _ordered(key[1] for key, _ in cells)
    values = np.full((len(rows), len(columns)), np.nan)
    for row, column in np.ndindex(values.shape):
        here = [value for key, value in cells if key == (columns[column], rows[row])]
        values[row, column] = np.mean(here) if here else np.nan
    share = metric == "needles"
    shown = 100 * values if share else values
    fig = style.new_figure(min(10.0, 3.0 + 0.85 * max(len(columns), 4)), 1.6 + 0.42 * max(len(rows), 4))
    axes = fig.subplots()
    finite = shown[np.isfinite(shown) & (shown > 0)]
    if share:
        axes.imshow(shown, cmap=style.SCORES, vmin=0, vmax=100, aspect="auto")
    else:
        wide = len(finite) and finite.max() > 8 * finite.min()
        norm = matplotlib.colors.LogNorm(finite.min(), finite.max()) if wide else None
        axes.imshow(shown, cmap=_LOW_IS_GOOD, norm=norm, aspect="auto")
    image = axes.images[0]
    for row, column in np.ndindex(shown.shape):
        value = shown[row, column]
        if math.isfinite(value):
            colour = style.ink_on(image.cmap(image.norm(value)))
            text = f"{value:.0f}" if share else style.number(value)
            axes.text(column, row, text, ha="center", va="center", fontsize=9.5, color=colour)
    for edge in range(1, len(columns)):
        axes.axvline(edge - 0.5, color=style.PAPER, linewidth=2)
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color=style.PAPER, linewidth=2)
    axes.set_xticks(range(len(columns)), [_label(value, x) for value in columns])
    axes.set_yticks(range(len(rows)), [_label(value, y) for value in rows])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_short(x))
    axes.set_ylabel(_short(y))
    axes.set_title(_title(metric))
    return fig


def _lines(lines: Mapping[str, Sequence[tuple[float, float]]], path: str, metric: str) -> Figure:
    """Single points `(x, y)`, and for each name a line through the mean at each x."""
    fig = style.new_figure(9.0, 4.4)
    axes = fig.subplots()
    scale = 100 if metric == "needles" else 1
    ends = []
    for i, (name, points) in enumerate(lines.items()):
        colour = style.LINES[i % len(style.LINES)]
        xs = sorted({x for x, _ in points})
        means = [scale * float(np.mean([y for x, y in points if x == at])) for at in xs]
        axes.plot(xs, means, color=colour, zorder=3, label=name)
        axes.plot([x for x, _ in points], [scale * y for _, y in points], "o", color=colour, markersize=5, zorder=4)
        ends.append((xs[-1], means[-1], name, colour))
    every = sorted({x for points in lines.values() for x, _ in points})
    if every[0] > 0 and every[-1] > 8 * every[0]:
        axes.set_xscale("log")
        if len(every) <= 9:
            axes.set_xticks(every)
        axes.xaxis.set_major_formatter(lambda x, _: _label(x, path))
        axes.minorticks_off()
    if metric == "needles":
        axes.set_ylim(-3, 103)
        axes.set_ylabel("needles found, %")
    else:
        values = [y for points in lines.values() for _, y in points if math.isfinite(y)]
        style.value_axis(axes, min(values, default=0), max(values, default=1), metric)
    style.grid_lines(axes)
    axes.set_xlabel(_short(path, numeric=True))
    axes.set_title(_title(metric))
    ends = [end for end in ends if end[2]]
    if len({x for x, *_ in ends}) <= 1:
        style.end_labels(axes, ends)
    else:  # a label at the end of a shorter line would lie on the longer ones
        axes.legend(frameon=False, loc="best")
    return fig


def _ordered(values: Any) -> list[Any]:
    unique = list(dict.fromkeys(values))
    return sorted(unique) if all(_is_number(value) for value in unique) else unique


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any, path: str) -> str:
    if not _is_number(value):
        return str(value)
    return style.tokens(value) if "len" in path and float(value).is_integer() else style.number(value)


def _short(path: str, numeric: bool = False) -> str:
    parts = re.sub(r"\[(\d+)\]", r".\1", path).removesuffix(".default").split(".")
    words = {"seq_len": "length", "max_position": "length", "positions": "theta" if numeric else "scheme"}
    return words.get(parts[-1], parts[-1].replace("_", " "))


def _title(metric: str) -> str:
    return {"needles": "Needles found, %", "perplexity": "Held-out perplexity"}.get(metric, metric.replace("_", " "))
