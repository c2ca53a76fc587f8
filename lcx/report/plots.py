"""The pictures of a run: needles over length and depth, perplexity against length, loss by position, loss by stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcx.evals import results
from lcx.evals.results import EvalResult
from lcx.report import style


@dataclasses.dataclass(frozen=True)
class StageCurve:
    """Loss of one stage over its steps, for drawing: steps count through the whole run; `kept` is False for a rolled-back try."""

    name: str
    length: int
    theta: float | None
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    kept: bool = True


@dataclasses.dataclass(frozen=True)
class PartCurve:
    """Mean loss of a mixture's part over the steps of one stage that had tokens of it, in nats per token."""

    steps: tuple[int, ...]
    loss: tuple[float, ...]


ROW = 15
"""Columns of cells that have room beside one another."""


@style.typography()
def needles(grids: Mapping[str, EvalResult]) -> Figure:
    """Needle heatmaps on one scale, side by side and in rows, under the keys as titles: x length, y depth, 0 at the top.

    Where the heatmaps differ in their number of items, each says below how many a cell holds.
    """
    widths = [len(grid.values("length")) for grid in grids.values()]
    across = max(1, min(len(grids), ROW // max(widths)))
    down = -(-len(grids) // across)
    wide = [max(widths[i::across]) for i in range(across)]
    rows = max(len(grid.values("depth")) for grid in grids.values())
    figure = style.new_figure(min(10.0, 2.2 + 0.75 * max(sum(wide), 6)), 0.3 + (1.2 + 0.36 * max(rows, 5)) * down)
    panels = list(figure.subplots(down, across, squeeze=False, width_ratios=wide).flat)
    for empty in panels[len(grids) :]:
        empty.remove()
    panels = panels[: len(grids)]
    draw_grids(panels, grids, across)
    score_bar(figure, panels)
    return figure


@style.typography()
def perplexity(curves: Mapping[str, EvalResult], trained: int | None = None, final: bool = False) -> Figure:
    """Held-out perplexity against length, one line for each curve, named at its end; `final` draws the last tokens' instead."""
    figure = style.new_figure(9.0, 4.6)
    draw_perplexity(figure.subplots(), curves, trained, final)
    return figure


@style.typography()
def score_by_length(curves: Mapping[str, EvalResult], task: str) -> Figure:
    """Mean scores of a task in percent against length, one line for each result, named at its end.

    Where the results differ in their number of items, the names say how many each has.
    """
    figure = style.new_figure(9.0, 4.2)
    axes, ends = figure.subplots(), []
    said = counted(list(curves.values()))
    for i, (name, curve) in enumerate(curves.items()):
        x, y = zip(*curve.by_length().items(), strict=True)
        colour = line_colour(name, i)
        axes.plot(x, y, color=colour, marker="o", markersize=4, zorder=3)
        ends.append((x[-1], y[-1], f"{name} ({said[i]} items)" if said[i] else name, colour))
    style.length_axis(axes, sorted({length for curve in curves.values() for length in curve.values("length")}))
    style.share_axis(axes)
    style.grid_lines(axes)
    axes.set_title(f"{task}: score by length")
    style.end_labels(axes, ends)
    return figure


@style.typography()
def positions(curves: Mapping[str, EvalResult], trained: int | None = None) -> Figure:
    """Mean held-out loss against the token's position in its window, one line for each curve."""
    figure = style.new_figure(9.0, 4.6)
    axes = figure.subplots()
    ends, values = [], []
    for i, (name, curve) in enumerate(curves.items()):
        bins = [row for row in curve.rows if row.positions is not None]
        pairs = [(math.sqrt(max(row.positions[0], 0.5) * row.positions[1]), row.value) for row in bins if math.isfinite(row.value)]
        if not pairs:
            continue
        x, y = zip(*pairs, strict=True)
        colour = line_colour(name, i)
        axes.plot(x, y, color=colour, zorder=3)
        ends.append((x[-1], y[-1], name, colour))
        values += y
    longest = max(max(curve.values("length")) for curve in curves.values())
    style.length_axis(axes, [2**k for k in range(math.ceil(math.log2(longest)) + 1)], "position in the window, tokens")
    style.value_axis(axes, *_extent(values), "loss, nats per token")
    style.grid_lines(axes)
    style.mark_trained(axes, trained, "base trained at" if "extended" in curves else "trained at")
    axes.set_title("Loss by position on held-out text")
    style.end_labels(axes, ends)
    return figure


@style.typography()
def losses(stages: Sequence[StageCurve]) -> Figure:
    """Training loss through the stages; each stage is shaded and named with its length and theta, rolled-back tries are grey."""
    figure = style.new_figure(9.0, 4.2)
    draw_losses(figure.subplots(), stages)
    return figure


@style.typography()
def part_losses(stages: Sequence[Mapping[str, PartCurve]]) -> Figure:
    """Training loss of each part of the mixture, by name, over the steps of the stages that a run kept; one line for each part."""
    figure = style.new_figure(9.0, 4.2)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for parts in stages for name in parts))
    values, ends, first, last = [], [], math.inf, 0
    for i, name in enumerate(names):
        colour, end = style.LINES[i % len(style.LINES)], None
        for curve in (parts[name] for parts in stages if name in parts):
            loss = np.asarray(curve.loss)
            steps, loss = np.asarray(curve.steps)[np.isfinite(loss)], loss[np.isfinite(loss)]
            if not len(loss):
                continue
            smooth = _smooth(loss, max(1, len(loss) // 25))
            axes.plot(steps, loss, color=colour, alpha=0.22, linewidth=0.8, zorder=2)
            axes.plot(steps, smooth, color=colour, linewidth=2, zorder=3)
            values += [*np.percentile(loss, [1, 98]), *smooth]
            first, last, end = min(first, steps[0]), max(last, steps[-1]), (steps[-1], smooth[-1])
        if end is not None:
            ends.append((*end, name, colour))
    # Not every part has tokens in the last step: names of lines that end near it share one column.
    ends = [(last if last - x < 0.05 * (last - first) else x, *rest) for x, *rest in ends]
    style.value_axis(axes, *_extent(values), "training loss, nats per token")
    if last > first:
        axes.set_xlim(first, last)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    style.grid_lines(axes)
    axes.set_title("Training loss by part of the mixture")
    style.end_labels(axes, ends)
    return figure


@style.typography()
def summary(
    before: EvalResult,
    after: EvalResult,
    curves: Mapping[str, EvalResult],
    stages: Sequence[StageCurve],
    titles: tuple[str, str] = ("before", "after"),
) -> Figure:
    """The picture for the README's first screen: needles before and after, and below them perplexity and the loss by stage."""
    rows = max(len(grid.values("depth")) for grid in (before, after))
    figure = style.new_figure(10.0, 5.0 + 0.3 * max(rows, 5))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.0 + 0.32 * max(rows, 5), 3.3], hspace=0.04)
    panels = top.subplots(1, 2, width_ratios=[len(grid.values("length")) for grid in (before, after)])
    draw_grids(panels, dict(zip(titles, (before, after), strict=True)))
    score_bar(top, panels)
    left, right = bottom.subplots(1, 2, width_ratios=[1, 1])
    if curves:
        draw_perplexity(left, curves, before.trained)
    else:
        left.set_axis_off()
    if stages:
        draw_losses(right, stages, width=4.2)
    else:
        right.set_axis_off()
    return figure


def draw_grids(panels: Sequence[Axes], grids: Mapping[str, EvalResult], across: int = 2) -> None:
    """Needle heatmaps into `panels`, `across` a row, under the keys as titles; one name of the x axis for all of them."""
    said = dict(zip(grids, counted(list(grids.values())), strict=True))
    for i, (panel, (title, grid)) in enumerate(zip(panels, grids.items(), strict=True)):
        draw_needles(panel, grid, title, first=i % across == 0)
        panel.set_xlabel(f"{said[title]} items a cell" if said[title] else "")
    panels[0].figure.supxlabel(style.CONTEXT, fontsize=10, color=style.MUTED)


def counted(found: Sequence[EvalResult]) -> list[str]:
    """How many items each result's rows have, as `4` or `4–20`; empty texts where all have the same number."""
    held = [sorted({row.n for row in result.rows}) for result in found]
    if len({n for counts in held for n in counts}) == 1:
        return [""] * len(held)
    return [f"{counts[0]:,}–{counts[-1]:,}" if counts[1:] else f"{counts[0]:,}" for counts in held]


def draw_needles(axes: Axes, grid: EvalResult, title: str, first: bool = True) -> None:
    """One heatmap into `axes`, with the share found printed in each cell and a line where training ended."""
    shares = 100 * np.asarray(grid.table())
    draw_cells(axes, shares, 9.5)
    rows, columns = shares.shape
    axes.set_xticks(range(columns), [style.tokens(x) for x in grid.values("length")])
    axes.set_yticks(range(rows), [f"{100 * depth:.0f}%" for depth in grid.values("depth")])
    axes.tick_params(labelleft=first)
    if first:
        axes.set_ylabel("depth of the needle")
    axes.set_title(title, pad=22)
    seen = sum(length <= grid.trained for length in grid.values("length"))
    edge = seen - 0.5
    axes.axvline(edge, color=style.INK, linewidth=1.6, clip_on=False, ymax=1.035)
    axes.annotate(
        f"trained to {style.tokens(grid.trained)}", (edge, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points",
        xytext=(4, 4) if seen <= columns / 2 else (-4, 4), ha="left" if seen <= columns / 2 else "right", va="bottom",
        fontsize=9, color=style.INK,
    )  # fmt: skip


def draw_cells(axes: Axes, percent: np.ndarray, size: float) -> None:
    """A table of percentages as a heatmap into `axes`, each printed in its cell in characters of a `size`; a dash for NaN."""
    axes.imshow(np.ma.masked_invalid(percent), cmap=style.SCORES, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    rows, columns = percent.shape
    for edge in np.arange(0.5, columns - 1):
        axes.axvline(edge, color=style.PAPER, linewidth=2)
    for edge in np.arange(0.5, rows - 1):
        axes.axhline(edge, color=style.PAPER, linewidth=2)
    for (row, column), share in np.ndenumerate(percent):
        known = np.isfinite(share)
        colour = style.ink_on(style.SCORES(share / 100)) if known else style.MUTED
        axes.text(column, row, f"{share:.0f}" if known else "–", ha="center", va="center", fontsize=size, color=colour)
    axes.spines[:].set_visible(False)


def draw_perplexity(axes: Axes, curves: Mapping[str, EvalResult], trained: int | None = None, final: bool = False) -> None:
    """Perplexity against length into `axes`."""
    ends, values, lengths = [], [], set()
    for i, (name, curve) in enumerate(curves.items()):
        chosen = curve.select(metric="final_nll" if final else "nll")
        losses = chosen.by_length() if chosen else {}
        pairs = [(x, y) for x, nll in losses.items() if math.isfinite(y := results.perplexity(nll))]
        if not pairs:
            continue
        x, y = zip(*pairs, strict=True)
        colour = line_colour(name, i)
        strong = name == "extended"
        axes.plot(
            x,
            y,
            color=colour,
            marker="o",
            markersize=5 if strong else 4,
            linewidth=2.8 if strong else 1.8,
            zorder=4 if strong else 3,
        )
        ends.append((x[-1], y[-1], name, colour))
        values += y
        lengths |= set(x)
    style.length_axis(axes, sorted(lengths))
    style.value_axis(axes, *_extent(values), "perplexity per token")
    style.grid_lines(axes)
    style.mark_trained(axes, trained, "base trained at" if "extended" in curves else "trained at")
    axes.set_title("Held-out perplexity, last tokens of each text" if final else "Held-out perplexity")
    style.end_labels(axes, ends)


def draw_losses(axes: Axes, stages: Sequence[StageCurve], width: float = 8.4) -> None:
    """Training loss by stage into `axes`, which are `width` inches wide (it decides which names fit)."""
    kept = [stage for stage in stages if stage.kept and stage.steps]
    values: list[float] = []
    for stage in stages:
        loss = np.asarray(stage.loss)
        steps = np.asarray(stage.steps)[np.isfinite(loss)]
        loss = loss[np.isfinite(loss)]
        if not len(loss):
            continue
        smooth = _smooth(loss, max(1, len(loss) // 25))
        colour = style.LINES[0] if stage.kept else style.MUTED
        axes.plot(steps, loss, color=colour, alpha=0.22, linewidth=0.8, zorder=2)
        axes.plot(
            steps, smooth, color=colour, linewidth=2 if stage.kept else 1.2, linestyle="-" if stage.kept else (0, (2, 2)), zorder=3
        )
        values += [*np.percentile(loss, [1, 98]), *smooth]
    if not values:
        return
    low, high = _extent(values)
    style.value_axis(axes, low, high, "training loss")
    last = max(max(stage.steps) for stage in stages if stage.steps)
    axes.set_xlim(min(min(stage.steps) for stage in stages if stage.steps), last)
    named = -math.inf
    for i, stage in enumerate(kept):
        start, stop = stage.steps[0], kept[i + 1].steps[0] if i + 1 < len(kept) else last
        if i % 2 == 0:
            axes.axvspan(start, stop, color="#F3F5F8", zorder=0, linewidth=0)
        lines = [style.tokens(stage.length)] + ([] if stage.theta is None else [f"θ {style.number(stage.theta)}"])
        room = (stop - start) / (0.075 / width * last)  # characters of this size that fit
        if room < len(lines[0]) + 1 or start < named:
            continue  # too narrow for its name; the table has it
        text = "\n".join(lines if room > max(map(len, lines)) else lines[:1])
        named = start + len(max(lines, key=len) if "\n" in text else text) * 0.075 / width * last
        axes.annotate(
            text, (start, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -4), textcoords="offset points",
            va="top", ha="left", fontsize=8.5, color=style.MUTED, linespacing=1.3, annotation_clip=True,
        )  # fmt: skip
    axes.set_ylim(axes.get_ylim()[0], _headroom(*axes.get_ylim(), log=axes.get_yscale() == "log"))
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    style.grid_lines(axes)
    axes.set_title("Training loss by stage")


def scheme_name(spec: str) -> str:
    """A name for a line that a reader understands without the spec's grammar."""
    return {"none": "unchanged", "rope:theta=critical": "theta raised"}.get(spec, spec)


def line_colour(name: str, index: int) -> str:
    """The colour of a curve: fixed for common names, so that pictures agree; else by its place in the order."""
    blue, amber, violet, teal, plum, *others = style.LINES
    fixed = {
        "unchanged": style.BEFORE, "before": style.BEFORE, "extended": style.AFTER, "after": style.AFTER,
        "linear": amber, "ntk": violet, "yarn": teal, "rope": plum, "theta": plum, "dynamic": blue,
    }  # fmt: skip
    return fixed.get(name.split(":")[0].split(" ")[0], others[index % len(others)])


def score_bar(figure: Figure, panels: Sequence[Axes], title: str = "found") -> None:
    """The colours of `style.SCORES` beside heatmaps."""
    bar = figure.colorbar(panels[-1].images[0], ax=list(panels), fraction=0.02, pad=0.02, aspect=26, ticks=[0, 50, 100])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["0", "50", "100%"])
    bar.ax.set_title(title, fontsize=9, fontweight="normal", color=style.MUTED, loc="left", pad=8)


def _extent(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def _headroom(low: float, high: float, log: bool) -> float:
    return high * (high / low) ** 0.18 if log else high + 0.18 * (high - low)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving average; at the start, where loss falls fast, its window shrinks on both sides, at the end on the right only."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    left = np.minimum(window, index)
    right = np.minimum(left, len(values) - 1 - index)
    return (total[index + right + 1] - total[index - left]) / (left + right + 1)
