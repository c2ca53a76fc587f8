"""The pictures of a curation: what stays and what goes, lengths, scores, calibration, and the map.

Legend: D documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcx.report import style

MOST, OTHERS = 8, "#A9B4BF"
"""Sources that have a colour of their own; the others share a grey."""
_MORE = ("#D6335A", "#7FA8D9", "#E0B36A", "#6C7683", "#B9A3DC", "#74BFAE")
PANEL = 4.8
"""Inches across of a picture that stands beside another one."""
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclasses.dataclass(frozen=True)
class Points:
    """The map: `xy` float `[D, 2]`, `cluster` and `source` int `[D]`, `kept` bool `[D]`, and the sources' names."""

    xy: np.ndarray
    cluster: np.ndarray
    source: np.ndarray
    kept: np.ndarray
    names: tuple[str, ...]


def size(value: float) -> str:
    """Bytes with three digits and a unit: `879 B`, `1.5 KiB`, `50.3 MiB`."""
    for unit, name in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 999.5 * unit else f"{value / unit:,.0f} {name}"
    return f"{value:,.0f} B"


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each source, by its place."""
    return {name: style.LINES[i] if i < MOST else OTHERS for i, name in enumerate(names)}


@style.typography()
def shares(sources: Mapping[str, Any], what: str) -> Figure:
    """Which share of each source's `documents` or `bytes` stays, and which each stage drops."""
    stages = list(dict.fromkeys(stage for of in sources.values() for stage, lost in of["dropped"].items() if lost["documents"]))
    painted = {"kept": style.AFTER, **dict(zip(stages, (*style.LINES[1:], *_MORE), strict=False))}
    figure = style.new_figure(PANEL, 1.1 + 0.36 * len(sources) + 0.2 * (-(-len(painted) // 3)))
    axes, left = figure.subplots(), np.zeros(len(sources))
    for part, colour in painted.items():
        found = [(of["kept"] if part == "kept" else of["dropped"].get(part, {})).get(what, 0) for of in sources.values()]
        width = np.asarray(found) / [max(of["read"][what], 1) for of in sources.values()]
        axes.barh(range(len(sources)), width, left=left, color=colour, height=0.62, zorder=2, label=part.replace("_", " "))
        left += width
    axes.set_xlim(0, 1)
    axes.set_ylim(len(sources) - 0.5, -0.5)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100%"])
    axes.set_yticks(range(len(sources)), [shortened(name) for name in sources])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"Share of {what}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


@style.typography()
def lengths(sources: Mapping[str, Any], what: str) -> Figure | None:
    """`documents` or `bytes` by length of the document, a colour a source, what was dropped in grey; None without lengths."""
    known = {name: of["lengths"] for name, of in sources.items() if of.get("lengths", {}).get("edges")}
    if not known:
        return None
    edges = sorted({edge for of in known.values() for edge in of["edges"]})
    counts = np.zeros((len(known), 2, len(edges) - 1))
    for row, of in zip(counts, known.values(), strict=True):
        first = edges.index(of["edges"][0])
        row[:, first : first + len(of["edges"]) - 1] = of["kept"][what], of["read"][what]
    # The shortest documents, a hundredth of all at most, share a bar.
    documents = sum(np.interp(edges[1:], of["edges"], [0, *np.cumsum(of["read"]["documents"])]) for of in known.values())
    below = int(np.searchsorted(documents, 0.01 * documents[-1], "right"))
    counts = np.concatenate([counts[:, :, : below + 1].sum(-1, keepdims=True), counts[:, :, below + 1 :]], -1)
    unit, name = next(((unit, name) for unit, name in _UNITS if what == "bytes" and counts.max() >= unit), (1, what))
    figure, painted = style.new_figure(PANEL, 3.5), colours(list(sources))
    axes, bottom, places = figure.subplots(), np.zeros(counts.shape[-1]), np.arange(counts.shape[-1])
    for source, row in zip(known, counts / unit, strict=True):
        axes.bar(places, row[0], bottom=bottom, color=painted[source], width=0.84, zorder=2, label=source)
        bottom += row[0]
    dropped = counts[:, 1].sum(0) / unit - bottom
    if dropped.any():
        axes.bar(places, dropped, bottom=bottom, color="#CBD3DB", width=0.84, zorder=2, label="dropped")
    style.grid_lines(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.number(y)))
    style.bar_edges(axes, [size(edge) for edge in edges[below + 1 : -1]], "length of the document", most=6)
    axes.set_title(f"{name.capitalize() if unit == 1 else name} by length")
    _legend(figure, painted, ["dropped"] if dropped.any() else [], "#CBD3DB")
    return figure


def _legend(figure: Figure, painted: Mapping[str, str], more: Sequence[str], colour: str) -> None:
    """Names of sources by colour, of those that share one a single `others`."""
    named = {shortened(name): hue for name, hue in list(painted.items())[:MOST]}
    named |= {"others": OTHERS} if len(painted) > MOST else {}
    marks = [(name, {"color": hue}) for name, hue in named.items()]
    marks += [(name, {"color": colour, "markerfacecolor": "none" if colour == style.MUTED else colour}) for name in more]
    handles = [
        Line2D([], [], marker="o" if colour == style.MUTED else "s", linestyle="", markersize=7, **look) for _, look in marks
    ]
    figure.legend(handles, [name for name, _ in marks], loc="outside lower left", ncols=4, frameon=False, fontsize=9)


@style.typography()
def score(of: Mapping[str, Any], title: str, minimum: float | None) -> Figure:
    """The histogram of a score of a source, with its median, and the minimum if there is one."""
    figure = style.new_figure(PANEL, 2.7)
    axes = figure.subplots()
    low, *_, high = of["deciles"]
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, len(of["histogram"]) + 1)
    width, middle = edges[1] - edges[0], (edges[:-1] + edges[1:]) / 2
    stays = np.ones(len(middle), bool) if minimum is None else middle >= minimum
    axes.bar(middle, of["histogram"], width=0.9 * width, color=np.where(stays, style.LINES[0], "#B9C4D0").tolist(), zorder=2)
    for at, what, height in ((of["deciles"][5], "median", 1.0), (minimum, "minimum", 0.89)):
        if at is not None and low <= at <= high:
            axes.axvline(at, color=style.INK, linewidth=1.0, linestyle=(0, (3, 3)), zorder=3)
            right = at - low > 0.6 * (high - low)
            axes.annotate(
                f"{what} {style.number(at)}", (at, height), xycoords=("data", "axes fraction"), xytext=(-4 if right else 4, -2),
                textcoords="offset points", fontsize=9, va="top", ha="right" if right else "left", color=style.INK,
            )  # fmt: skip
    axes.set_xlim(low - width / 2, high + width / 2)
    axes.set_ylim(0, 1.28 * max(of["histogram"]))
    style.grid_lines(axes)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: style.number(y)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("documents")
    axes.set_title(shortened(title, 40))
    return figure


@style.typography()
def calibration(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """The share of good documents against the predicted probability, of held-out labels; an area is a number of documents."""
    figure = style.new_figure(PANEL, 3.8)
    axes, used = figure.subplots(), [one for one in bins if one["documents"]]
    axes.plot([0, 1], [0, 1], color=style.MUTED, linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
    x, y = ([one[key] for one in used] for key in ("predicted", "good"))
    most = max(one["documents"] for one in used)
    areas = [20 + 160 * one["documents"] / most for one in used]
    axes.plot(x, y, color=style.LINES[0], linewidth=1.4, zorder=2)
    axes.scatter(x, y, s=areas, color=style.LINES[0], zorder=3, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("predicted P(good)")
    axes.set_ylabel("share that is good")
    axes.set_title("Calibration on held-out labels")
    style.grid_lines(axes)
    return figure


@style.typography()
def corpus_map(points: Points, painted: Mapping[str, str]) -> Figure | None:
    """Documents in the plane in the colour of their source, hollow where dropped, and the number of each cluster at its middle."""
    if not len(points.xy):
        return None
    figure = style.new_figure(6.2, 4.8)
    axes = figure.subplots()
    area = float(np.clip(4500 / len(points.xy), 1.5, 18))
    for source, colour in enumerate(painted[name] for name in points.names):
        for kept in (False, True):
            x, y = points.xy[(points.source == source) & (points.kept == kept)].T
            face = colour if kept else "none"
            axes.scatter(x, y, s=area, facecolors=face, edgecolors=colour, linewidths=0.5, alpha=0.75 if kept else 0.45, zorder=2)
    for cluster, (x, y) in _named_clusters(points):
        axes.annotate(
            str(cluster + 1), (x, y), ha="center", va="center", fontsize=9, fontweight="bold", color=style.INK, zorder=4,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": style.PAPER, "edgecolor": style.FAINT, "alpha": 0.88},
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    _legend(figure, {name: painted[name] for name in points.names}, [] if points.kept.all() else ["dropped"], style.MUTED)
    return figure


def _named_clusters(points: Points) -> list[tuple[int, np.ndarray]]:
    """Clusters and their middles, the largest first, without those whose number would cover another one's."""
    room = 0.05 * np.ptp(points.xy, axis=0)
    placed: list[tuple[int, np.ndarray]] = []
    counts = np.bincount(points.cluster[points.cluster >= 0]) if (points.cluster >= 0).any() else np.zeros(0, int)
    for cluster in np.argsort(-counts, kind="stable").tolist():
        middle = np.median(points.xy[points.cluster == cluster], axis=0) if counts[cluster] else None
        if middle is not None and not any((abs(middle - other) < room).all() for _, other in placed):
            placed.append((cluster, middle))
    return placed


def shortened(name: str, most: int = 22) -> str:
    """A name that fits beside a bar."""
    return name if len(name) <= most else name[: most - 1] + "…"
