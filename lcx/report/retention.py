"""What a report says about short contexts: the extended model against the one before it, on the same items."""

from __future__ import annotations

import html

from lcx.core.numbers import counted
from lcx.evals.comparison import Comparison, compare
from lcx.evals.results import EvalResult
from lcx.report.page import Cell, table

LOSSES = {
    ("perplexity", "nll"): "held-out text",
    ("perplexity", "final_nll"): "last tokens of held-out text",
    ("long_perplexity", "nll"): "key tokens (LongPPL)",
    ("long_perplexity", "other_nll"): "other tokens",
}
SIGNS = {"better": "better", "worse": "worse", "equal": "no difference shown", "unknown": "one item only"}


def section(before: EvalResult | None, after: EvalResult | None) -> str:
    """A table of paired differences at lengths that the first model was trained at; empty where nothing can be paired."""
    found = compare(before, after, longest=before.trained) if before and after else []
    if not found:
        return ""
    certain = [row for row in found if row.has_interval]
    worse = [row for row in certain if row.verdict == "worse"]
    if worse:
        said = f"Worse than before in {len(worse)} of {counted(len(certain), 'comparison')}."
    elif certain:
        said = f"The extended model is worse than before beyond chance in 0 of {counted(len(certain), 'comparison')}."
    else:
        said = "A single item shows nothing: score more text, or ask more questions."
    note = (
        f"{said} Both models answered the same items, up to the {before.trained:,} tokens that the first was trained at; "
        "differences are paired, with the half-width of their 95% interval in grey. Losses are in nats per token."
    )
    rows = [(_row(row), "strong" if row.verdict == "better" else "") for row in found]
    heads = ("task", "length", "items", "before", "after", "difference", "")
    return table(heads, rows) + f"<p class=note>{html.escape(note)}</p>"


def _row(row: Comparison) -> tuple[Cell, ...]:
    gap: Cell = row.shown(row.difference.mean, "+")
    if row.has_interval:
        gap = (gap, f"±{row.shown((row.difference.high - row.difference.low) / 2)}")
    means = row.shown(row.before), row.shown(row.after)
    return called(row.task, row.metric), f"{row.length:,}", f"{row.n:,}", *means, gap, SIGNS[row.verdict]


def called(task: str, metric: str) -> str:
    """What a task's metric is the mean of, in words: the task for a score, and for a loss the tokens that it is over."""
    if metric in ("score", "accuracy"):
        return task
    if metric == "bits_per_byte":
        return f"bits per byte, {LOSSES.get((task, 'nll'), task)}"
    if (task, metric) in LOSSES:
        return f"loss, {LOSSES[task, metric]}"
    if task.startswith("loss_by_kind_"):
        return f"loss by kind: {task.removeprefix('loss_by_kind_').replace('_', ' ')}"
    if task.startswith("loss_by_source_"):
        return f"loss by source: {task.removeprefix('loss_by_source_')}"
    return f"{task} ({metric})"
