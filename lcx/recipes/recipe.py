"""A whole recipe in one config: train the stages, evaluate the model before and after its extension, write the report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from lcx.core import configs, processes
from lcx.core.configs import choice
from lcx.core.console import say
from lcx.core.errors import UserError, naming
from lcx.core.mesh import make_mesh
from lcx.data.config import PartConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals import results
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Evaluator
from lcx.evals.config import EvalConfig
from lcx.evals.results import EvalResult
from lcx.evals.runner import chosen_tasks, evaluate, fitting_tasks, gather
from lcx.evals.zero_shot import at_length
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import refuse_moved
from lcx.recipes import models
from lcx.training import goodput
from lcx.training.checkpoints import FOLDER
from lcx.training.loading import Loaded
from lcx.training.loop import train
from lcx.training.profile import ProfileSteps
from lcx.training.stages import RunConfig, StageConfig, run_config, stage_ends
from lcx.training.workdir import CONFIG, read_config, record_environment


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run, and how to judge it.

    `base_stage` names the stage after which the model counts as trained; what follows extends it. The model is evaluated there
    (`before`, with the zero-shot schemes) and at the end (`after`). Without it `before` are the weights that the run began with,
    if it began with any.
    """

    run: RunConfig
    evals: EvalConfig = EvalConfig()
    base_stage: str | None = None


def defaults(stages: Mapping[str, Mapping[str, Any]], **model: Any) -> ml_collections.ConfigDict:
    """Every field of a recipe with its default as a `ConfigDict`, so that flags reach all of them.

    `stages` maps names to at least `seq_len`, `steps` and `batch_size`, in running order; `model` changes the model's.
    """
    refuse_moved(*(f"config.model.{name}" for name in model))
    built = [configs.build(StageConfig, {"name": name, **values}, f"stages.{name}") for name, values in stages.items()]
    config = configs.to_config_dict(RunConfig(model=ModelConfig(**model), stages=tuple(built)))
    config.stages = ml_collections.ConfigDict({}, type_safe=False)
    for stage in built:
        config.stages[stage.name] = configs.to_config_dict(stage)
        del config.stages[stage.name]["name"]
    config.stage_order = tuple(stages)
    config.evals = configs.to_config_dict(EvalConfig())
    config.base_stage = ml_collections.config_dict.placeholder(str)
    return config


def part(**values: Any) -> ml_collections.ConfigDict:
    """A part of a mixture with every field of `PartConfig`, so that flags reach all of them."""
    return configs.to_config_dict(configs.build(PartConfig, values, "part"))


def variant_of(asked: str, *known: str) -> str:
    """`asked`, which a user wrote behind the config file's name as in `file.py:variant`; raises `UserError` if it is not known."""
    return asked and choice("the config's variant", asked, known)


def recipe(config: ml_collections.ConfigDict) -> Recipe:
    """The checked recipe of a config; raises `UserError` for anything that is wrong with it."""
    values = config.to_dict()
    evals = configs.build(EvalConfig, values.pop("evals", {}), "config.evals")
    chosen_tasks(evals)
    base_stage = values.pop("base_stage", None)
    run = run_config(values)
    if base_stage is not None:
        choice("config.base_stage", base_stage, [stage.name for stage in run.stages])
    return Recipe(run, evals, base_stage)


def run_recipe(
    chosen: Recipe,
    workdir: Path,
    command: Sequence[str],
    profile: ProfileSteps | None = None,
    fewer: str | None = None,
    since: float | None = None,
) -> None:
    """Train, evaluate and report. Finished parts are not repeated, so the same command resumes after any interruption.

    With `fewer` (`training.loop.train`) the time that training will take is said first. `since` is when the process began, in
    seconds of the epoch (None: now), for the record of where the time goes.
    """
    if all(processes.exchange("finished", is_finished(chosen, workdir))):
        if profile is not None:
            profile.check(stage_ends(chosen.run)[-1], stage_ends(chosen.run)[-1])
        say(f"{workdir} is finished: {stage_ends(chosen.run)[-1]} steps; report: {workdir / 'report.html'}")
        return
    # What no text of an evaluation fits into is said now, not after the training.
    fitting_tasks(gather(chosen.run.data, chosen.evals), quiet=True)
    with goodput.Recorder(since) as record:
        given = models.initial_weights(chosen.run.init_from)
        train(chosen.run, workdir, given=given, profile=profile, fewer=fewer, record=record)
        if processes.is_first():
            record_environment(workdir, command)
        with record.span(goodput.EVALUATION):
            if chosen.base_stage is not None:
                evaluate_stage(chosen, workdir, "before", chosen.base_stage)
            elif chosen.run.init_from is not None:
                evaluate_source(chosen, workdir)
            evaluate_stage(_extended(chosen), workdir, "after", chosen.run.stages[-1].name)
        with record.span(goodput.REPORT):
            # Loaded only now: drawing takes a library that a finished run repeated does without.
            from lcx.report.report import write_report

            if processes.is_first():
                say(f"report: {write_report(workdir)}")


def is_finished(chosen: Recipe, workdir: Path) -> bool:
    """Whether the workdir holds the end of this very run, its evaluations and its report; nothing is read but their settings."""
    ends, names = stage_ends(chosen.run), [stage.name for stage in chosen.run.stages]
    files = (workdir / CONFIG, workdir / FOLDER / str(ends[-1]), workdir / "report.html")
    if not all(path.exists() for path in files):
        return False
    # Over which devices it ran is not asked: another machine splits it in another way.
    if configs.plain(dataclasses.replace(read_config(workdir), mesh=chosen.run.mesh)) != configs.plain(chosen.run):
        return False
    wanted = [(_extended(chosen), "after", ends[-1])]
    if chosen.base_stage is not None:
        wanted.append((chosen, "before", ends[names.index(chosen.base_stage)]))
    elif chosen.run.init_from is not None:
        wanted.append((chosen, "before", None))
    return all(_known(of, workdir, label, step) is not None for of, label, step in wanted)


def _extended(chosen: Recipe) -> Recipe:
    """The recipe as its extended model is evaluated: under its own scheme alone."""
    return dataclasses.replace(chosen, evals=dataclasses.replace(chosen.evals, zero_shot=()))


def evaluate_stage(chosen: Recipe, workdir: Path, label: str, stage: str) -> EvalResult:
    """The evaluation of the model at the end of a stage, kept as `eval/<label>.json`."""
    loaded = models.load(workdir, stage=stage, mesh=make_mesh(chosen.run.evaluation_mesh))
    return _known_to_all(chosen, workdir, label, loaded.meta.step) or evaluate_loaded(loaded, chosen.evals, label, workdir)


def evaluate_source(chosen: Recipe, workdir: Path) -> EvalResult:
    """The evaluation, kept as `before`, of the weights that the run began with, on the run's data, computed as in the run."""
    loaded = models.load(str(chosen.run.init_from), mesh=make_mesh(chosen.run.evaluation_mesh))
    run = dataclasses.replace(loaded.run, data=chosen.run.data, execution=chosen.run.execution)
    loaded = dataclasses.replace(loaded, run=run)
    return _known_to_all(chosen, workdir, "before", loaded.meta.step) or evaluate_loaded(loaded, chosen.evals, "before", workdir)


def free_label(workdir: Path, label: str, evals: EvalConfig, **others: object) -> str:
    """`label`, with a number behind it where the workdir keeps a result of other settings under it (see `is_free`)."""
    names = itertools.chain([label], (f"{label}-{i}" for i in itertools.count(2)))
    return next(name for name in names if is_free(workdir, name, evals, **others))


def is_free(workdir: Path, label: str, evals: EvalConfig, step: int | None = None, **others: object) -> bool:
    """Whether the workdir keeps no result under a label but one of these settings, and of this step (None: of any).

    `others` are settings of the result besides those of `evals`: `chat_template`, `endpoint`, and `runner.settings_of` a model.
    """
    found = _result(workdir, label)
    return found is None or _is_of(found, evals, step, others)


def _known(chosen: Recipe, workdir: Path, label: str, step: int | None) -> EvalResult | None:
    """The result that is there already, if it is of this step (None: of any) and these settings."""
    found = _result(workdir, label)
    others = {"chat_template": chosen.run.data.chat_template, "compute_dtype": chosen.run.execution.compute_dtype}
    return found if found is not None and _is_of(found, chosen.evals, step, others) else None


def _known_to_all(chosen: Recipe, workdir: Path, label: str, step: int) -> EvalResult | None:
    """The same, unless another process of the job does not see it."""
    found = _known(chosen, workdir, label, step)
    return found if all(processes.exchange("known", found is not None)) else None


def _result(workdir: Path, label: str) -> EvalResult | None:
    path = workdir / "eval" / f"{label}.json"
    return results.read(path) if path.exists() else None


def _is_of(found: EvalResult, evals: EvalConfig, step: int | None, others: Mapping[str, object]) -> bool:
    """Whether a result is of these settings, and of this step (None: of any)."""
    # A result of an earlier version lacks the settings that came later, which had their defaults, or are not known.
    asked = {**configs.plain(EvalConfig()), **found.settings.get("evals", {})}
    wanted = {"chat_template": None, "endpoint": None, **others}
    there = {**others, "chat_template": None, "endpoint": None, **found.settings}
    same = all(_telling(there[name]) == _telling(value) for name, value in wanted.items())
    return asked == configs.plain(evals) and same and step in (None, found.step)


def _telling(value: object) -> object:
    """A setting of a result; of an endpoint, what its answers depend on."""
    return {name: value[name] for name in ("url", "model", "api")} if isinstance(value, Mapping) else value


def evaluate_loaded(loaded: Loaded, evals: EvalConfig, label: str, workdir: Path | None) -> EvalResult:
    """Evaluate loaded weights under the schemes that they were last trained with."""
    run, meta = loaded.run, loaded.meta
    schemes = build_schemes(run.model, loaded.schemes)
    judge = None
    if evals.evaluator is not None:
        if "long_perplexity" not in evals.tasks:
            raise UserError(
                f"evals.evaluator={evals.evaluator} has nothing to judge: only long_perplexity has key tokens, and evals.tasks is "
                f"{', '.join(evals.tasks)}; add it to evals.tasks, or leave evals.evaluator out"
            )
        with naming({"checkpoint": "evals.evaluator"}):
            chosen = models.load(evals.evaluator, dtype=models.AUTO)
        judge = Evaluator(
            functools.cache(lambda length: backend_of(chosen, length, tokens_per_forward=evals.tokens_per_forward)),
            tokenizers.load(chosen.run.data.tokenizer),
            evals.evaluator,
        )
    return evaluate(
        loaded.params, run.model, run.execution, schemes, run.data, evals,
        trained=meta.length, label=label, step=meta.step, stop_ids=loaded.stop_ids, workdir=workdir, evaluator=judge,
    )  # fmt: skip


def backend_of(loaded: Loaded, length: int, positions: str = "none", at: int | None = None, **options: Any) -> LocalBackend:
    """Loaded weights as a backend for contexts of up to `length` tokens, under their own scheme or one to try zero-shot.

    The factor of `positions` is the one `at` that length (None: at `length`). `options` are the backend's own.
    """
    run = loaded.run
    schemes = at_length(build_schemes(run.model, loaded.schemes), positions, loaded.meta.length, at or length)
    return LocalBackend(
        loaded.params, run.model, run.execution, schemes, length, tokenizer=tokenizers.load(run.data.tokenizer),
        stop_ids=loaded.stop_ids, scheme=positions, **options,
    )  # fmt: skip
