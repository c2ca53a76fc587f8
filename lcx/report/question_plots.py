"""The pictures of questions in words: scores by task and length, and by how many shots or turns a prompt holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lcx.evals.results import EvalResult
from lcx.report import style
from lcx.report.plots import draw_cells, line_colour, score_bar

COUNTED = ("shots", "turns", "operations")
"""Metrics that say how many units the prompts of a length hold (`lcx.evals.text.questions.TextQuestions.counts`)."""


BANDS = 3
"""The most curves that are drawn with their intervals: more bands hide one another."""


def by_scheme(results: Sequence[EvalResult]) -> dict[str, EvalResult]:
    """The rows of each result and scheme by the name that a picture gives them, where questions in words were asked.

    Models that were trained at shorter lengths come first.
    """
    found = {}
    for result in sorted(results, key=lambda result: result.trained):
        for scheme in result.values("scheme"):
            rows = result.select(scheme=scheme)
            if rows is not None and rows.select(metric="score") is not None:
                found[result.label if scheme == "none" else f"{result.label}, {scheme}"] = rows
    return found


def scored(found: EvalResult) -> EvalResult:
    """The rows of scores, of questions in words and of needles alike."""
    return dataclasses.replace(found, rows=tuple(row for row in found.rows if row.metric in ("score", "accuracy")))


@style.typography()
def tasks(named: Mapping[str, EvalResult]) -> Figure:
    """A heatmap a model, side by side: y tasks, x context length, mean scores in percent; what was not asked stays white."""
    scores = {name: scored(found) for name, found in named.items()}
    rows = list(dict.fromkeys(task for found in scores.values() for task in found.values("task")))
    lengths = {name: sorted(found.values("length")) for name, found in scores.items()}
    columns = sum(map(len, lengths.values()))
    figure = style.new_figure(min(12.0, 3.2 + 0.62 * max(columns, 6)), 1.6 + 0.32 * max(len(rows), 4))
    panels = figure.subplots(1, len(lengths), squeeze=False, width_ratios=[len(shown) for shown in lengths.values()])[0]
    for i, (axes, (name, shown)) in enumerate(zip(panels, lengths.items(), strict=True)):
        table = np.full((len(rows), len(shown)), np.nan)
        for y, task in enumerate(rows):
            found = scores[name].select(task=task)
            for length, share in found.by_length().items() if found else ():
                table[y, shown.index(length)] = 100 * share
        draw_cells(axes, table, 8.5)
        axes.set_xticks(range(len(shown)), [style.tokens(length) for length in shown])
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(labelleft=i == 0)
        axes.set_title(name.replace(", ", "\n"), fontsize=9.5)
    figure.supxlabel(style.CONTEXT, fontsize=10, color=style.MUTED)
    score_bar(figure, panels, "score")
    return figure


@style.typography()
def growth(task: str, named: Mapping[str, EvalResult]) -> Figure | None:
    """Mean score against the number of shots, turns or operations, with a guess's; None without such rows.

    Up to `BANDS` curves have their 95% intervals.
    """
    figure, what, ends, ticks, chance = style.new_figure(9.0, 4.2), "", [], set(), None
    axes = figure.subplots()
    for i, (name, found) in enumerate(named.items()):
        rows = found.select(task=task)
        for metric in COUNTED:
            counts, scores = (rows.select(metric=m) if rows else None for m in (metric, "score"))
            if counts is None or scores is None:
                continue
            what, units = metric, counts.by_length()
            points = sorted((units[row.length], row.value, row.low, row.high) for row in scores.rows if row.length in units)
            x, y, low, high = zip(*points, strict=True)
            colour = line_colour(name.rpartition(", ")[2], i)
            axes.plot(x, y, color=colour, marker="o", markersize=4, zorder=3)
            if len(named) <= BANDS:
                axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0, zorder=2)
            ends.append((x[-1], y[-1], name, colour))
            ticks |= set(x)
            guess = rows.select(metric="chance")
            chance = guess.rows[0].value if guess else None
    if not ends:
        return None
    style.length_axis(axes, sorted(ticks), f"{what} in the prompt")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    axes.set_ylabel("score")
    if chance is not None:
        axes.axhline(chance, color=style.MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate("a guess", (min(ticks), chance), xytext=(0, 3), textcoords="offset points", fontsize=8.5, color=style.MUTED)
    style.grid_lines(axes)
    axes.set_title(f"{task}: score by number of {what}")
    style.end_labels(axes, ends)
    return figure
