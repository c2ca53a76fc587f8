"""How scores grow over checkpoints or model sizes, every one of them plotted, with a fit and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lcx.evals.results import EvalResult, Measurement
from lcx.evals.statistics import drawn_means
from lcx.report import style

DRAWS, LEAST = 1000, 3
"""Draws of a fit's interval, and the fewest points of a curve: two would hide what lies between them."""


class Fit(NamedTuple):
    """A line over log2 x: what each doubling of x adds, with its 95% interval, and the line and its band at `x`."""

    slope: float
    low: float
    high: float
    x: np.ndarray
    line: np.ndarray
    band: tuple[np.ndarray, np.ndarray]


class Points(NamedTuple):
    """A task at a length: `x` with the mean score there, its 95% interval, and the single scores."""

    x: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]


def axis(results: Sequence[EvalResult]) -> tuple[str, dict[str, float]] | None:
    """What the results differ in, "parameters" or "step", and its value by label; None if fewer than `LEAST` values differ."""
    for name, of in (("parameters", lambda result: result.settings.get("parameters")), ("step", lambda result: result.step)):
        found = {result.label: float(value) for result in results if isinstance(value := of(result), int) and value > 0}
        if len(set(found.values())) >= LEAST:
            return name, found
    return None


def points(results: Sequence[EvalResult], at: dict[str, float]) -> dict[tuple[str, int], Points]:
    """The points of each task at its lengths under the models' own schemes, those of at least `LEAST` values of x."""
    found: dict[tuple[str, int], dict[float, list[Measurement]]] = {}
    for result in results:
        for row in result.rows if result.label in at else ():
            if row.scheme == "none" and row.metric in ("score", "accuracy") and row.scores:
                found.setdefault((row.task, row.length), {}).setdefault(at[result.label], []).append(row)
    made = {}
    for key, by_x in found.items():
        if len(by_x) >= LEAST:
            columns = [_point(x, rows) for x, rows in sorted(by_x.items())]
            made[key] = Points(*zip(*columns, strict=True))
    return made


def _point(x: float, rows: Sequence[Measurement]) -> tuple[float, float, float, float, tuple[float, ...]]:
    scores = tuple(score for row in rows for score in row.scores or ())
    low, high = np.quantile(drawn_means(scores, DRAWS, np.random.default_rng(0)), [0.025, 0.975])
    return x, sum(scores) / len(scores), float(low), float(high), scores


def fit(found: Points) -> Fit:
    """Least squares over log2 x; its interval is that of fits to means drawn anew for every point."""
    rng = np.random.default_rng(0)
    x = np.log2(found.x)
    slope, start = np.polyfit(x, found.value, 1)
    drawn = np.stack([drawn_means(scores, DRAWS, rng) for scores in found.scores])
    slopes, starts = np.polyfit(x, drawn, 1)
    at = np.linspace(x[0], x[-1], 64)
    low, high = np.quantile(starts + slopes * at[:, None], [0.025, 0.975], axis=1)
    first, last = np.quantile(slopes, [0.025, 0.975])
    return Fit(float(slope), float(first), float(last), 2.0**at, start + slope * at, (low, high))


@style.typography()
def curve(task: str, what: str, by_length: dict[int, Points]) -> Figure:
    """Mean scores of a task over steps or parameters, a line for each length."""
    figure = style.new_figure(9.0, 4.4)
    axes, ends = figure.subplots(), []
    for i, (length, found) in enumerate(sorted(by_length.items())):
        colour, made = style.LINES[i % len(style.LINES)], fit(found)
        axes.fill_between(made.x, *np.clip(made.band, 0, 1), color=colour, alpha=0.09, linewidth=0, zorder=1)
        axes.plot(made.x, made.line, color=colour, linewidth=1.6, zorder=2)
        errors = np.abs(np.array([found.low, found.high]) - np.array(found.value))
        axes.errorbar(found.x, found.value, yerr=errors, color=colour, fmt="o", markersize=4.5, linewidth=1.0, zorder=3)
        gain = f"{100 * made.slope:+.1f} [{100 * made.low:+.1f}, {100 * made.high:+.1f}]"
        ends.append((found.x[-1], float(made.line[-1]), f"{style.tokens(length)}: {gain}", colour))
    axes.set_xscale("log", base=2)
    ticks = sorted({x for found in by_length.values() for x in found.x})
    axes.set_xticks(ticks, [style.number(x) for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel({"step": "training step", "parameters": "parameters"}[what])
    style.share_axis(axes)
    style.grid_lines(axes)
    axes.set_title(f"{task}: points gained by each doubling, at each length")
    style.end_labels(axes, ends)
    return figure


def curves(results: Sequence[EvalResult], lengths: int = 4) -> dict[str, Figure]:
    """A picture for each task that was measured at enough checkpoints or sizes, at up to so many of its lengths, spread evenly."""
    differing = axis(results)
    if differing is None:
        return {}
    what, at = differing
    found = points(results, at)
    made = {}
    for task in dict.fromkeys(task for task, _ in found):
        known = sorted(length for name, length in found if name == task)
        chosen = known if len(known) <= lengths else [known[round(i * (len(known) - 1) / (lengths - 1))] for i in range(lengths)]
        made[task] = curve(task, what, {length: found[task, length] for length in chosen})
    return made
