"""Evaluations in forms for other programs and papers: every row as CSV, scores by task and length as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from lcx.evals.results import EvalResult
from lcx.report import markdown
from lcx.report.question_plots import by_scheme, scored

COLUMNS = ("task", "metric", "scheme", "length", "depth", "value", "low", "high", "n")
"""The fields of a row that a CSV holds, behind the evaluation's label, step and trained length."""


def as_csv(results: Sequence[EvalResult]) -> str:
    """One line a row, with a header; what does not apply is empty. Losses by position, whose rows are ranges, are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("label", "step", "trained", *COLUMNS))
    for result in results:
        for row in result.rows:
            if row.positions is None:
                values = (getattr(row, name) for name in COLUMNS)
                writer.writerow(["" if x is None else x for x in (result.label, result.step, result.trained, *values)])
    return text.getvalue()


def as_markdown(results: Sequence[EvalResult]) -> str:
    """A table of mean scores in percent for each evaluation and scheme that has questions in words; empty without any."""
    parts = []
    for name, found in by_scheme(results).items():
        scores = scored(found)
        lengths = sorted(scores.values("length"))
        rows = []
        for task in scores.values("task"):
            by_length = scores.select(task=task).by_length()
            rows.append((task, *(f"{100 * by_length[n]:.1f}" if n in by_length else "" for n in lengths)))
        parts.append(f"## {name}\n\n{markdown.table(('task', *(f'{n:,}' for n in lengths)), rows)}\n")
    return "\n".join(parts)
