"""What a report says about short contexts: the extended model against the one before it, on the same items."""

from __future__ import annotations

import html

from lcx.evals.comparison import Comparison, compare
from lcx.evals.results import EvalResult
from lcx.report.page import Cell, table

SIGNS = {"better": "better", "worse": "worse", "equal": "no difference shown"}


def section(before: EvalResult | None, after: EvalResult | None) -> str:
    """A table of paired differences at lengths that the first model was trained at; empty where nothing can be paired."""
    found = compare(before, after, longest=before.trained) if before and after else []
    if not found:
        return ""
    worse = [row for row in found if row.verdict == "worse"]
    said = (
        f"Worse than before in {len(worse)} of {len(found)} comparisons."
        if worse
        else f"In none of {len(found)} comparisons is the extended model worse than before beyond chance."
    )
    note = (
        f"{said} Both models answered the same items, up to the {before.trained:,} tokens that the first was trained at; "
        "differences are paired, with the half-width of their 95% interval in grey. Losses are in nats a token."
    )
    rows = [(_row(row), "strong" if row.verdict == "better" else "") for row in found]
    heads = ("task", "length", "items", "before", "after", "difference", "")
    return table(heads, rows) + f"<p class=note>{html.escape(note)}</p>"


def _row(row: Comparison) -> tuple[Cell, ...]:
    half = (row.difference.high - row.difference.low) / 2
    name = row.task if row.metric in ("score", "accuracy") else f"{row.task} ({row.metric})"
    gap = (row.shown(row.difference.mean, "+"), f"±{row.shown(half)}")
    return name, f"{row.length:,}", f"{row.n:,}", row.shown(row.before), row.shown(row.after), gap, SIGNS[row.verdict]
