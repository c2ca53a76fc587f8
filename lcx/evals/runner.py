"""All tasks of an evaluation on one checkpoint, under its own positional scheme and any other, into one JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from lcx.core import configs, processes
from lcx.core.configs import choice
from lcx.core.console import Progress, say
from lcx.core.errors import UserError
from lcx.core.host import give_back_freed_memory
from lcx.core.numbers import duration
from lcx.core.trees import Tree, num_elements
from lcx.data.config import DataConfig, SourceConfig
from lcx.data.sources import sources
from lcx.data.tokenizers import tokenizers
from lcx.evals import forecast, results
from lcx.evals.answers import AnswerLog
from lcx.evals.backends.endpoint import EndpointBackend
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Backend, Evaluator, Materials, Task, warn_left_out
from lcx.evals.config import EndpointConfig, EvalConfig
from lcx.evals.forecast import Cell
from lcx.evals.readers.files import FileQuestions
from lcx.evals.results import EvalResult, Measurement, perplexity
from lcx.evals.tasks.table import GROUPS, TASKS
from lcx.evals.text.questions import TextQuestions, average
from lcx.evals.zero_shot import at_length, refuse_learned
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.flops import forward_flops
from lcx.positions.scheme import Scheme

FOLDER, ANSWERS = "eval", "answers.jsonl"
"""The folder of a workdir that holds its evaluations, and the file there that holds the answers of them all."""


def gather(data: DataConfig, config: EvalConfig) -> Materials:
    """What the tasks of an evaluation are made from; documents are read when a task asks for them."""
    tokenizer = tokenizers.load(data.tokenizer)

    @functools.cache
    def heldout(source: SourceConfig) -> sources.Subset:
        return sources.split(sources.load(source, tokenizer, data.chat_template), data.heldout_fraction, "heldout")

    return Materials(config, data, tokenizer, heldout)


def chosen_tasks(config: EvalConfig) -> list[Callable[[Materials], Task | None]]:
    """The rows of the table that `evals.tasks` names, groups taken apart.

    Raises `UserError` with the nearest name for another.
    """
    named = [choice("evals.tasks", name, (*TASKS, *GROUPS)) for name in config.tasks]
    chosen = list(dict.fromkeys(one for name in named for one in GROUPS.get(name, (name,))))
    return [TASKS[name] for name in chosen]


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
    evaluator: Evaluator | None = None,
) -> EvalResult:
    """Measure a checkpoint trained up to `trained` tokens; with a workdir, write `eval/<label>.json` there, and answers one by one.

    `schemes` maps layer kinds to the scheme that the checkpoint was last trained under. Under `zero_shot` specs the factor is
    length / trained, chosen at each length unless the spec fixes it. Without an `evaluator` the model judges itself.
    """
    started = time.perf_counter()
    give_back_freed_memory()
    for spec in config.zero_shot:
        # A slip in the last spec is said before the first is measured, not after.
        for length in config.lengths:
            chosen = at_length(schemes, spec, trained, length)
            if spec.strip() != "none":
                refuse_learned(spec, {kind: x for kind, x in chosen.items() if x != schemes[kind]}, model, length)
            build_architecture(model, execution, chosen, length)
    materials = gather(data, config)

    @functools.cache
    def backend(spec: str, length: int) -> LocalBackend:
        chosen = at_length(schemes, spec, trained, length)
        return LocalBackend(
            params,
            model,
            execution,
            chosen,
            length,
            config.tokens_per_forward,
            materials.tokenizer,
            stop_ids,
            spec,
            config.share_prefixes,
        )

    materials = dataclasses.replace(
        materials, evaluator=evaluator or Evaluator(functools.partial(backend, "none"), materials.tokenizer)
    )
    specs = ("none", *(spec for spec in config.zero_shot if spec != "none"))
    work = functools.partial(forward_flops, model, 1)
    rows, notes = _measured(fitting_tasks(materials), specs, backend, work, config, label, workdir, announce)
    settings = {**_settings(data, config), **settings_of(params, execution)}
    return _kept(EvalResult(label, trained, step, rows, time.perf_counter() - started, settings, notes), workdir)


def settings_of(params: Tree, execution: ExecutionConfig) -> dict[str, object]:
    """What a result's settings say about the model: its number of parameters, and the types it is held and computed in."""
    largest = max(jax.tree.leaves(params), key=lambda x: x.size)
    return {"parameters": num_elements(params), "weights_dtype": str(largest.dtype), "compute_dtype": execution.compute_dtype}


def evaluate_endpoint(
    endpoint: EndpointConfig,
    data: DataConfig,
    config: EvalConfig,
    *,
    label: str = "eval",
    workdir: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = say,
) -> EvalResult:
    """Measure a model behind a server, as `evaluate` does one of lcx, by questions in words; `data` names its tokenizer.

    Raises `UserError` for tasks that ask for more than words.
    """
    started, backend = time.perf_counter(), EndpointBackend(endpoint)
    tasks = fitting_tasks(gather(data, config))
    for task, _ in tasks:
        if not isinstance(task, TextQuestions | FileQuestions):
            words = ", ".join(GROUPS)
            raise UserError(f"evals.tasks has {task.name!r}, which no server answers; choose tasks in words, such as {words}")
    rows, notes = _measured(tasks, ("none",), lambda spec, length: backend, float, config, label, workdir, announce)
    settings = {**_settings(data, config), "endpoint": configs.plain(endpoint)}
    longest = max(config.lengths)
    return _kept(EvalResult(label, longest, None, rows, time.perf_counter() - started, settings, notes), workdir)


def fitting_tasks(materials: Materials, quiet: bool = False) -> list[tuple[Task, list[int]]]:
    """The tasks of an evaluation, and the lengths of each: those that it fits into, after a warning about others unless `quiet`.

    Raises `UserError` for a task that fits into none, if it is named itself or its group has no other, and for text or files that
    none reads.
    """
    found: list[tuple[Task, list[int]]] = []
    left_out: dict[tuple[int, ...], list[str]] = {}
    for task in (build(materials) for build in chosen_tasks(materials.config)):
        if task is None:
            continue
        fitting: list[int] = []
        refused: dict[int, UserError] = {}
        for length in sorted(materials.config.lengths):
            try:
                task.check(length)
                fitting.append(length)
            except UserError as error:
                refused[length] = error
        if refused and (min(fitting) < max(refused) if fitting else task.name in materials.config.tasks):
            raise refused[max(refused)]
        if fitting:
            found.append((task, fitting))
        if refused:
            left_out.setdefault(tuple(refused), []).append(task.name)
            last = refused[max(refused)]
    if left_out and not found:
        raise last
    for lengths, names in () if quiet else left_out.items():
        warn_left_out(names, lengths)
    materials.refuse_unread()
    return found


def _measured(
    tasks: Sequence[tuple[Task, Sequence[int]]],
    specs: Sequence[str],
    backend: Callable[[str, int], Backend],
    work: Callable[[int], float],
    config: EvalConfig,
    label: str,
    workdir: str | os.PathLike[str] | None,
    announce: Callable[[str], None],
) -> tuple[tuple[Measurement, ...], tuple[str, ...]]:
    """The rows of all tasks under all schemes at all lengths, and what readers of them should know.

    `work` is what one row of a length costs, in a unit of its own.
    """
    planned = [(spec, task, lengths, count) for spec in specs for task, lengths in tasks if (count := task.count(spec != "none"))]
    log = AnswerLog(None if workdir is None else pathlib.Path(workdir) / FOLDER / ANSWERS, label)
    rows: list[Measurement] = []
    cells = [_cell(task, spec, length, count, work) for spec, task, lengths, count in planned for length in lengths]
    with Progress(f"{label}: measuring", len(cells), every=None, even=False) as bar:
        following = _Course(bar, cells, log)
        for spec, task, lengths, count in planned:
            found: list[Measurement] = []
            for length in lengths:
                with following.next(task.answers(count)):
                    found += task.measure(backend(spec, length), length, count, log)
            rows += [dataclasses.replace(row, scheme=spec) for row in found]
            announce(f"{label}: {task.name}, {spec}: {_by_part(task.name, found) or _by_length(found)}")
    for name, members in GROUPS.items():
        averages = average(rows, name, members)
        for spec in dict.fromkeys(row.scheme for row in averages):
            announce(f"{label}: {name}, {spec}: {_by_length([row for row in averages if row.scheme == spec])}")
        rows += averages
    return tuple(rows), tuple(note for task, _ in tasks for note in task.notes)


def _cell(task: Task, spec: str, length: int, count: int, work: Callable[[int], float]) -> Cell:
    """A cell with its work: of one row of its length for each item, or of the windows that the same text is cut into."""
    return Cell(task.name, spec, length, work(length) / length if task.same_text else work(length) * count)


class _Course:
    """What the bar of an evaluation says: the cell, its answers so far, and about how much time is left."""

    def __init__(self, bar: Progress, cells: Sequence[Cell], log: AnswerLog):
        self._bar, self._coming, self._log = bar, list(cells), log
        self._seconds: dict[Cell, float] = {}

    @contextlib.contextmanager
    def next(self, answers: int | None) -> Iterator[None]:
        """Around the measurement of the next cell, which is to add so many `answers` to the log, or fewer if it holds some."""
        started, before = time.perf_counter(), self._log.added
        doing = "{0.task}, {0.scheme} at {0.length:,}".format(self._coming[0])
        self._bar.advance(doing + _left(forecast.remaining(self._coming, self._seconds)))
        cell = self._coming.pop(0)
        first: tuple[float, int] | None = None

        def heard(added: int) -> None:
            nonlocal first
            took, here, whole = time.perf_counter() - started, 0.0, self._seconds
            first = first or (took, added)
            if answers and added > first[1]:
                # Programs are compiled for the first answers, so that only those after them say how long the others take.
                here = (before + answers - added) * (took - first[0]) / (added - first[1])
                whole = {**whole, cell: took + here}
            elif answers and self._seconds:
                here = (forecast.remaining([cell], self._seconds) or 0.0) - took
            left = forecast.remaining(self._coming, whole)
            self._bar.note(f"{doing}, answer {added - before:,}" + _left(None if left is None else left + max(0.0, here)))

        self._log.heard = heard
        yield
        new = self._log.added - before
        if answers is None or new:
            self._seconds[cell] = (time.perf_counter() - started) * (1.0 if answers is None else answers / new)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"; about {duration(seconds)} left"


def _settings(data: DataConfig, config: EvalConfig) -> dict[str, object]:
    return {"evals": configs.plain(config), "chat_template": data.chat_template}


def _kept(result: EvalResult, workdir: str | os.PathLike[str] | None) -> EvalResult:
    if workdir is not None and processes.is_first():
        results.write(result, pathlib.Path(workdir) / FOLDER / f"{result.label}.json")
    return result


def _by_part(task: str, rows: Sequence[Measurement]) -> str | None:
    """What a task that splits its tokens into parts found of each, at the longest length; None of other tasks."""
    parts = [row for row in rows if row.task.startswith(f"{task}_") and row.metric == "nll"]
    if not parts:
        return None
    longest = max(row.length for row in parts)
    shown = {row.task.removeprefix(f"{task}_"): perplexity(row.value) for row in parts if row.length == longest}
    return f"perplexity at {longest:,}: " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _by_length(rows: Sequence[Measurement]) -> str:
    """The task's score, or its first metric, at each length: shares as percentages, losses as perplexity."""
    rows = [row for row in rows if row.metric != "left_out"]
    if not rows:
        return "nothing of these lengths"
    if all(row.metric == "key_share" for row in rows):
        return "no key tokens"
    metric = "score" if any(row.metric == "score" for row in rows) else rows[0].metric
    found = EvalResult("", 0, rows=tuple(row for row in rows if row.metric == metric)).by_length().items()
    shown = {n: f"{perplexity(value):.4g}" if metric == "nll" else f"{100 * value:.0f}%" for n, value in found}
    return "  ".join(f"{length:,}: {text}" for length, text in shown.items())
