"""What a report says about likelihoods: loss of kinds of tokens by context length, and key tokens drawn over their text."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lcx.evals.results import EvalResult, perplexity
from lcx.report import style
from lcx.report.page import Cell, table
from lcx.report.plots import line_colour, scheme_name

PASSAGES = 2
"""Passages that are drawn."""

KINDS = "loss_by_kind_"

KINDS_NOTE = (
    "Every panel spans the same number of nats, so slopes and gaps can be compared; where a line falls, these tokens gain from "
    "more context. The number beside a line is its loss at the longest length."
)


@style.typography()
def kinds(before: EvalResult | None, after: EvalResult) -> Figure | None:
    """A panel a kind of token: its loss against context length, before the extension and after; None without such rows.

    Panels have the same height in nats, each around its own losses, so that slopes and gaps can be compared. Schemes that were
    tried zero-shot are thin lines without a number.
    """
    curves = _curves(before, after)
    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    if not names:
        return None
    values = {name: [loss for found in curves.values() for loss in found.get(name, {}).values()] for name in names}
    span = 1.16 * max(max(held) - min(held) for held in values.values()) or 0.2
    across = min(3, len(names))
    down = -(-len(names) // across)
    wide = max(6.4, 3.0 * across + 0.4)
    figure = style.new_figure(wide, 1.75 * down + 0.9)
    figure.get_layout_engine().set(wspace=0.05)  # between the numbers of a panel and the ticks of the next
    panels = list(figure.subplots(down, across, squeeze=False, sharex=True).flat)
    for empty in panels[len(names) :]:
        empty.set_axis_off()
    for i, (axes, name) in enumerate(zip(panels, names, strict=False)):
        ends = []
        for place, (title, found) in enumerate(curves.items()):
            if name not in found:
                continue
            x, y = zip(*found[name].items(), strict=True)
            colour, own = line_colour(title, place), title in ("before", "after")
            axes.plot(x, y, color=colour, linewidth=1.8 if own else 1.1, zorder=3 if own else 2, label=title)
            axes.plot(x, y, color=colour, marker="o", markersize=3.5 if own else 0, linestyle="none", zorder=3)
            if own:
                ends.append((x[-1], y[-1], f"{y[-1]:.2f}", colour))
        style.length_axis(axes, sorted({length for found in curves.values() for of in found.values() for length in of}), "")
        middle = (min(values[name]) + max(values[name])) / 2
        low = max(0.0, middle - span / 2)
        axes.set_ylim(low, low + span)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        style.grid_lines(axes)
        axes.set_title(name.replace("_", " "), fontsize=10.5, pad=6)
        axes.tick_params(labelbottom=i + across >= len(names), labelsize=8.5)
        style.end_labels(axes, ends, size=8.5)
    figure.suptitle("Held-out loss by kind of token", fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(style.CONTEXT, fontsize=10, color=style.MUTED)
    figure.supylabel("loss, nats per token", fontsize=10, color=style.MUTED)
    if len(curves) > 1:
        handles = [Line2D([], [], color=line_colour(title, i), label=title) for i, title in enumerate(curves)]
        figure.legend(handles=handles, loc="outside upper right", ncols=int((wide - 2.8) / 1.05), frameon=False, fontsize=9)
    return figure


def _curves(before: EvalResult | None, after: EvalResult) -> dict[str, dict[str, dict[int, float]]]:
    """Finite losses by length of each kind, under `before`, the schemes tried on the first model, and `after`."""
    found = {}
    for result in filter(None, (before, after)):
        for scheme in ("none",) if before and result is after else result.values("scheme"):
            rows = result.select(scheme=scheme)
            tasks = [task for task in rows.values("task") if task.startswith(KINDS)] if rows else []
            losses = {task.removeprefix(KINDS): rows.select(task=task, metric="nll").by_length() for task in tasks}
            losses = {name: {n: x for n, x in by_length.items() if math.isfinite(x)} for name, by_length in losses.items()}
            if losses := {name: by_length for name, by_length in losses.items() if by_length}:
                title = scheme_name(scheme) if scheme != "none" else "after" if result is after else "before"
                found[title] = losses
    return found


def losses(results: Sequence[EvalResult]) -> str:
    """A table of losses of key tokens and of sources for each result and scheme; empty where none was measured."""
    rows: list[tuple[Sequence[Cell], str]] = []
    lengths = sorted({row.length for result in results for row in result.rows if _shown(row.task)})
    for result in sorted(results, key=lambda result: result.trained):
        for scheme in result.values("scheme"):
            found = result.select(scheme=scheme)
            for task in found.values("task") if found else ():
                if not _shown(task):
                    continue
                name = result.label if scheme == "none" else f"{result.label}, {scheme}"
                shown = found.select(task=task)
                for metric in ("nll", "other_nll"):
                    by_length = chosen.by_length() if (chosen := shown.select(metric=metric)) else {}
                    cells = (style.number(perplexity(by_length[n])) if n in by_length else "–" for n in lengths)
                    if chosen:
                        rows.append(((name, (_called(task, metric), f" {chosen.rows[0].n:,}"), *cells), ""))
    if not rows:
        return ""
    note = " ".join(dict.fromkeys(note for result in results for note in result.notes if note.startswith("Key tokens")))
    heads = ("model", "perplexity of so many", *(f"{n:,}" for n in lengths))
    return table(heads, rows) + (f"<p class=note>{html.escape(note)}</p>" if note else "")


def _shown(task: str) -> bool:
    return task == "long_perplexity" or task.startswith("loss_by_source_")


def _called(task: str, metric: str) -> str:
    if task == "long_perplexity":
        return "key tokens (LongPPL)" if metric == "nll" else "other tokens"
    return task.removeprefix("loss_by_source_")


def passages(answers: Sequence[Mapping[str, Any]]) -> str:
    """The passages with the most key tokens, every token shaded by the weight that LongCE would give it in training."""
    held = [answer for answer in answers if answer.get("passage", {}).get("keys")]
    held.sort(key=lambda answer: len(answer["passage"]["keys"]), reverse=True)
    # The same text was perhaps judged more than once.
    chosen = list({"".join(answer["passage"]["texts"]): answer for answer in held}.values())[:PASSAGES]
    if not chosen:
        return ""
    note = (
        "Shaded by exp(gain), from 1 to 5: how much more likely a token is when the evaluator reads the whole context and not "
        "only the last tokens before it; that is its weight in LongCE. Key tokens are underlined."
    )
    return "".join(map(_passage, chosen)) + f"<p class=note>{html.escape(note)}</p>"


def _passage(answer: Mapping[str, Any]) -> str:
    texts, weights, keys = (answer["passage"][name] for name in ("texts", "weights", "keys"))
    marked, parts = set(keys), []
    for i, (text, weight) in enumerate(zip(texts, weights, strict=True)):
        share = min(1.0, max(0.0, (weight - 1) / 4))
        shade = f"background:rgb(10 154 118 / {0.55 * share:.2f});" if share > 0.02 else ""
        line = "text-decoration:underline 2px;" if i in marked else ""
        shown = html.escape(text)
        parts.append(f"<span style='{shade}{line}' title='{weight:.2f}'>{shown}</span>" if shade or line else shown)
    said = f"As judged by {answer.get('evaluator') or 'the model itself'} over {answer['length']:,} tokens:"
    return f"<p class=note>{html.escape(said)}</p><pre class=passage>{''.join(parts)}</pre>"
