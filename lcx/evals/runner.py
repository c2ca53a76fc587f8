"""All tasks of an evaluation on one checkpoint, under its own positional scheme and any other, into one JSON."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

from lcx.core import configs
from lcx.core.configs import choice
from lcx.core.console import Progress, say
from lcx.core.trees import Tree
from lcx.data.config import DataConfig, SourceConfig
from lcx.data.sources import sources
from lcx.data.tokenizers import tokenizers
from lcx.evals import results
from lcx.evals.answers import AnswerLog
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Materials, Task
from lcx.evals.config import EvalConfig
from lcx.evals.results import EvalResult, Measurement, perplexity
from lcx.evals.tasks.table import GROUPS, TASKS
from lcx.evals.text.questions import average
from lcx.evals.zero_shot import at_length, refuse_learned
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.positions.scheme import Scheme

ANSWERS = "answers.jsonl"
"""The file in a workdir's `eval` that holds the answers of all its evaluations."""


def gather(data: DataConfig, config: EvalConfig) -> Materials:
    """What the tasks of an evaluation are made from; documents are read when a task asks for them."""
    tokenizer = tokenizers.load(data.tokenizer)

    @functools.cache
    def heldout(source: SourceConfig) -> sources.Subset:
        return sources.split(sources.load(source, tokenizer, data.chat_template), data.heldout_fraction, "heldout")

    return Materials(config, data, tokenizer, heldout)


def chosen_tasks(config: EvalConfig) -> list[Callable[[Materials], Task | None]]:
    """The rows of the table that `evals.tasks` names, groups taken apart; raises `UserError` with the nearest name for another."""
    named = [choice("evals.tasks", name, (*TASKS, *GROUPS)) for name in config.tasks]
    return [TASKS[name] for name in dict.fromkeys(one for name in named for one in GROUPS.get(name, (name,)))]


def evaluate(
    params: Tree,
    model: ModelConfig,
    execution: ExecutionConfig,
    schemes: Mapping[str, Scheme],
    data: DataConfig,
    config: EvalConfig,
    *,
    trained: int,
    label: str = "eval",
    step: int | None = None,
    stop_ids: Sequence[int] = (),
    workdir: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = say,
) -> EvalResult:
    """Measure a checkpoint trained up to `trained` tokens; with a workdir, write `eval/<label>.json` there, and answers one by one.

    `schemes` maps layer kinds to the scheme that the checkpoint was last trained under. Under `zero_shot` specs the factor is
    length / trained, chosen at each length unless the spec fixes it.
    """
    started = time.perf_counter()
    for spec in config.zero_shot:
        # A slip in the last spec is said before the first is measured, not after.
        for length in config.lengths:
            chosen = at_length(schemes, spec, trained, length)
            if spec.strip() != "none":
                refuse_learned(spec, {kind: x for kind, x in chosen.items() if x != schemes[kind]}, model, length)
            build_architecture(model, execution, chosen, length)
    materials = gather(data, config)
    tasks = [task for task in (build(materials) for build in chosen_tasks(config)) if task is not None]
    for task in tasks:
        for length in config.lengths:
            task.check(length)
    specs = ("none", *(spec for spec in config.zero_shot if spec != "none"))
    planned = [(spec, task, count) for spec in specs for task in tasks if (count := task.count(spec != "none"))]
    settings = {"evals": configs.plain(config)}
    kept = None if workdir is None else pathlib.Path(workdir) / "eval"
    log = AnswerLog(kept and kept / ANSWERS)
    rows: list[Measurement] = []

    @functools.cache
    def backend(spec: str, length: int) -> LocalBackend:
        chosen = at_length(schemes, spec, trained, length)
        return LocalBackend(
            params, model, execution, chosen, length, config.tokens_per_forward, materials.tokenizer, stop_ids, spec
        )

    with Progress(f"{label}: measuring", len(planned) * len(config.lengths), every=None) as bar:
        for spec, task, count in planned:
            found: list[Measurement] = []
            for length in sorted(config.lengths):
                bar.advance(f"{task.name}, {spec} at {length:,}")
                found += task.measure(backend(spec, length), length, count, log)
            rows += [dataclasses.replace(row, scheme=spec) for row in found]
            announce(f"{label}: {task.name}, {spec}: {_by_length(found)}")
    for name, members in GROUPS.items():
        found = average(rows, name, members)
        for spec in dict.fromkeys(row.scheme for row in found):
            announce(f"{label}: {name}, {spec}: {_by_length([row for row in found if row.scheme == spec])}")
        rows += found
    notes = tuple(note for task in tasks for note in task.notes)
    result = EvalResult(label, trained, step, tuple(rows), time.perf_counter() - started, settings, notes)
    if kept is not None:
        results.write(result, kept / f"{label}.json")
    return result


def _by_length(rows: Sequence[Measurement]) -> str:
    """The task's first metric at each length: shares as percentages, losses as perplexity."""
    metric = rows[0].metric
    found = EvalResult("", 0, rows=tuple(row for row in rows if row.metric == metric)).by_length().items()
    shown = {n: f"{perplexity(value):.4g}" if metric == "nll" else f"{100 * value:.0f}%" for n, value in found}
    return "  ".join(f"{length:,}: {text}" for length, text in shown.items())
