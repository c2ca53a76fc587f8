"""What a report says about likelihoods: loss of kinds of tokens by context length, and key tokens drawn over their text."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lcx.evals.results import EvalResult, perplexity
from lcx.report import style
from lcx.report.page import Cell, table

PASSAGES = 2
"""Passages that are drawn."""

KINDS = "loss_by_kind_"


@style.typography()
def kinds(before: EvalResult | None, after: EvalResult) -> Figure | None:
    """Loss of each kind of token against context length, dashed for the model before its extension; None without such rows."""
    lines = {}
    for result, dash in ((after, "-"), (before, (0, (3, 2)))):
        own = result.select(scheme="none") if result else None
        for task in own.values("task") if own else ():
            if task.startswith(KINDS):
                lines[task.removeprefix(KINDS), dash] = own.select(task=task).by_length()
    if not lines:
        return None
    figure = style.new_figure(9.0, 5.2)
    axes, ends, values, lengths = figure.subplots(), [], [], set()
    names = list(dict.fromkeys(name for name, _ in lines if name != "new"))
    for (name, dash), found in lines.items():
        x, y = zip(*((n, loss) for n, loss in found.items() if math.isfinite(loss)), strict=True)
        colour = style.LINES[names.index(name) % len(style.LINES)] if name != "new" else style.MUTED
        faint = dash != "-"
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.1 if faint else 1.9, alpha=0.6 if faint else 1.0, zorder=3)
        if not faint:
            axes.plot(x, y, color=colour, linestyle="none", marker="o", markersize=4, zorder=3)
            ends.append((x[-1], y[-1], name.replace("_", " "), colour))
        values += y
        lengths |= set(x)
    style.length_axis(axes, sorted(lengths))
    style.value_axis(axes, min(values), max(values), "loss, nats per token")
    style.grid_lines(axes)
    axes.set_title("Held-out loss by kind of token" + (", dashed: before the extension" if len({d for _, d in lines}) > 1 else ""))
    style.end_labels(axes, ends)
    return figure


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
