"""One picture of what evaluations found, chosen by what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.evals.results import EvalResult
from lcx.report import plots, question_plots
from lcx.report.question_plots import scored

Named = EvalResult | Sequence[EvalResult] | Mapping[str, EvalResult]


def overview(found: Named, task: str | None = None) -> Figure:
    """Results and their schemes side by side, under their labels or the keys of a mapping.

    Of one task, which `task` may choose: a heatmap over length and depth if it has depths, else lines over length. Of several: a
    table of scores by task and length. Without any scores: perplexity by length. Raises `UserError` if there is nothing of these.
    """
    named = _by_scheme(_titled(found))
    if task is not None:
        known = dict.fromkeys(name for rows in named.values() for name in rows.values("task"))
        choice("task", task, known)
        named = _those(named, lambda rows: rows.select(task=task))
    scores = _those(named, lambda rows: one if (one := scored(rows)).rows else None)
    tasks = dict.fromkeys(name for rows in scores.values() for name in rows.values("task"))
    if len(tasks) > 1:
        return question_plots.tasks(scores)
    if scores and all(row.depth is not None for rows in scores.values() for row in rows.rows):
        return plots.needles(scores)
    if scores:
        return plots.score_by_length(scores, next(iter(tasks)))
    curves = _those(named, lambda rows: rows.select(metric="nll"))
    if not curves:
        raise UserError(f"{', '.join(named) or 'no row'} has neither scores nor perplexity to draw; evaluate other tasks")
    return plots.perplexity(curves)


def _titled(found: Named) -> dict[str, EvalResult]:
    if isinstance(found, Mapping):
        return dict(found)
    listed = [found] if isinstance(found, EvalResult) else list(found)
    labels = [result.label for result in listed]
    # Two results of one label are told apart by what their models were trained at, and then by their order.
    unique = len(set(labels)) == len(labels)
    titles = labels if unique else [f"{result.label}, trained to {result.trained:,}" for result in listed]
    if len(set(titles)) < len(titles):
        titles = [f"{title} ({i})" for i, title in enumerate(titles, 1)]
    return dict(zip(titles, listed, strict=True))


def _by_scheme(named: Mapping[str, EvalResult]) -> dict[str, EvalResult]:
    found = {}
    for title, result in named.items():
        for scheme in result.values("scheme"):
            if (rows := result.select(scheme=scheme)) is not None:
                found[title if scheme == "none" else f"{title}, {scheme}"] = rows
    return found


def _those(named: Mapping[str, EvalResult], chosen: Callable[[EvalResult], EvalResult | None]) -> dict[str, EvalResult]:
    return {title: part for title, rows in named.items() if (part := chosen(rows)) is not None}
