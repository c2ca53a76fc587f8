"""What a report says about questions in words: scores by task and length, published averages, and answers to read."""

from __future__ import annotations

import collections
import dataclasses
import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lcx.evals.results import EvalResult, Measurement
from lcx.evals.statistics import interval
from lcx.report.page import table

PUBLISHED = {
    "Gemini-1.5-Pro": (96.7, 95.8, 96.0, 95.9, 95.9, 94.4),
    "Qwen2.5-14B-Instruct-1M": (97.5, 97.1, 94.6, 94.9, 94.9, 92.2),
    "Llama-3.1-8B-Instruct": (95.5, 93.8, 91.6, 87.4, 84.7, 77.0),
    "ProLong-8B": (94.5, 92.5, 92.3, 89.3, 83.2, 81.6),
    "Gradient-Llama-3-8B-1M": (92.8, 90.3, 85.7, 79.9, 76.3, 69.5),
    "LWM-7B-1M": (82.3, 78.4, 73.7, 69.1, 68.1, 65.0),
}
"""Averages of RULER's thirteen tasks at `LENGTHS` (github.com/NVIDIA/RULER, and the models' own reports)."""

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


READ = 2
"""Wrong answers, and right ones, that are shown of each task."""


def grids(results: Sequence[EvalResult]) -> dict[str, dict[str, EvalResult]]:
    """For each task with depths the scores over length and depth, by title, of every result under its own scheme."""
    found: dict[str, dict[str, EvalResult]] = {}
    for result in results:
        own = result.select(metric="score", scheme="none")
        for task in own.values("task") if own else ():
            grid = own.select(task=task)
            if grid.rows[0].depth is not None:
                found.setdefault(task, {})[f"{task}: {result.label}"] = grid
    return found


def reading(answers: Sequence[Mapping[str, Any]], finished: Collection[str]) -> str:
    """Some answers of each task at its longest length, wrong ones first, as people learn most from those.

    `finished` are the labels of evaluations that have results; what others answered is said to be of an interrupted one.
    """
    groups: dict[str, dict[tuple[str, str], list[Mapping[str, Any]]]] = {}
    for answer in answers:
        if "output" in answer:
            asked = (answer.get("label", ""), answer.get("scheme", "none"))
            groups.setdefault(answer["task"], {}).setdefault(asked, []).append(answer)
    parts = []
    for task, found in groups.items():
        for (label, scheme), of_task in found.items():
            longest = max(answer["length"] for answer in of_task)
            here = [answer for answer in of_task if answer["length"] == longest]
            wrong, right = ([x for x in here if (x["score"] >= 1) == good] for good in (False, True))
            shown = "".join(map(_answer, (*wrong[:READ], *right[:READ])))
            who = [label, "" if scheme == "none" else scheme, "interrupted" if label and label not in finished else ""]
            said = f"{task} at {longest:,}, {len(right)} of {len(here)} right"
            said = ": ".join(filter(None, (", ".join(filter(None, who)), said)))
            parts.append(f"<details><summary>{html.escape(said)}</summary>{shown}</details>")
    return "".join(parts)


def _answer(answer: Mapping[str, Any]) -> str:
    rows = [
        (("the prompt ends", f"… {answer['asked']}"), ""),
        (("answered", answer["output"] or "(nothing)"), ""),
        (("wanted", ", ".join(answer["references"])), ""),
        (("score", f"{answer['score']:.2f}"), "strong" if answer["score"] >= 1 else ""),
    ]
    head = f"question {answer['number'] + 1}"
    return f"<div class='words answers'>{table((head, ''), rows)}</div>"


def section(results: Sequence[EvalResult]) -> str:
    """A table for each result and scheme that has answered questions in words; empty if there is none."""
    ordered = sorted(results, key=lambda result: result.trained)
    parts = [_scores(result, scheme) for result in ordered for scheme in result.values("scheme")]
    return "".join(parts)


def _scores(result: EvalResult, scheme: str) -> str:
    found = result.select(scheme=scheme, metric="score")
    if found is None:
        return ""
    lengths = sorted(found.values("length"))
    rows = [((task.removeprefix("ruler_"), *_cells(found.select(task=task), lengths)), "") for task in found.values("task")]
    average = result.select(scheme=scheme, task="ruler", metric="average")
    notes = []
    if average is not None:
        known = average.by_length()
        notes.append(_effective(found, known))
        rows.append(((f"average of {average.rows[0].n}", *(_number(known.get(n)) for n in lengths)), "strong"))
        if set(lengths) & set(LENGTHS):
            rows += [((name, *(_number_at(scores, n) for n in lengths)), "dim") for name, scores in PUBLISHED.items()]
            notes.append("Below the average stand published averages of all thirteen tasks, asked in RULER's own words.")
    notes.append(f"Mean scores of {_asked(found)} questions a cell, in percent, with the half-width of their 95% interval in grey.")
    empty = [row for row in _rows(result, scheme, "empty") if row.value > 0]
    if empty:
        worst = max(empty, key=lambda row: row.value)
        notes.append(f"Empty answers count as wrong: up to {100 * worst.value:.0f}%, in {worst.task} at {worst.length:,}.")
    name = result.label if scheme == "none" else f"{result.label}, {scheme}"
    head = (name, *(f"{length:,}" for length in lengths))
    return table(head, rows) + f"<p class=note>{html.escape(' '.join(notes))}</p>"


def _effective(found: EvalResult, lengths: Collection[int]) -> str:
    """RULER's effective length among these with its interval: every task weighs alike, as each has as many questions."""
    ruler = [row for row in found.rows if row.task.startswith("ruler_") and row.length in lengths]
    scores = dataclasses.replace(found, rows=tuple(ruler))
    certain = scores.effective_interval()
    range_of = f" (95% interval {certain[0]:,}–{certain[1]:,})" if certain else ""
    return f"Effective length, the longest up to which every average exceeds 85.6%: {scores.effective_length():,}{range_of}."


def _asked(found: EvalResult) -> str:
    """How many questions a task has at a length, as text: "20", or "20 to 100"."""
    counts = collections.Counter[tuple[str, int]]()
    for row in found.rows:
        counts[row.task, row.length] += row.n
    fewest, most = min(counts.values()), max(counts.values())
    return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"


def _cells(found: EvalResult | None, lengths: Sequence[int]) -> list[str | tuple[str, str]]:
    return [_cell(found.select(length=length) if found else None) for length in lengths]


def _cell(found: EvalResult | None) -> str | tuple[str, str]:
    """The mean over all depths, and the half-width of the interval of all their scores; Wilson's if a row does not keep them."""
    if found is None:
        return "–"
    kept = all(row.scores for row in found.rows)
    low, high = interval([score for row in found.rows for score in row.scores or ()]) if kept else found.interval()
    return _number(found.mean()), f"±{50 * (high - low):.0f}"


def _number(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _number_at(scores: Sequence[float], length: int) -> str:
    return f"{scores[LENGTHS.index(length)]:.1f}" if length in LENGTHS else ""


def _rows(result: EvalResult, scheme: str, metric: str) -> Sequence[Measurement]:
    found = result.select(scheme=scheme, metric=metric)
    return found.rows if found else ()
