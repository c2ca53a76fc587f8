"""Evaluate a checkpoint: needles over length x depth and perplexity by length, under its own or any other scheme.

lcx eval --checkpoint=runs/quickstart --stage=base_256 --positions=yarn:factor=16 --lengths=256,1024,4096
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from lcx.cli import config_flags, distributed_flags, parse
from lcx.core import configs
from lcx.core.console import say
from lcx.core.errors import UserError, naming
from lcx.data.config import DataConfig
from lcx.evals.config import EndpointConfig, EvalConfig, QuestionConfig
from lcx.evals.runner import chosen_tasks, evaluate_endpoint, settings_of
from lcx.recipes import models
from lcx.recipes.cores import evaluation_mesh
from lcx.recipes.recipe import evaluate_loaded, free_label, is_free

FLAGS = {
    "evals.tasks": "--tasks",
    "evals.lengths": "--lengths",
    "evals.zero_shot": "--positions",
    "evals.perplexity_tokens": "--perplexity_tokens",
    "evals.evaluator": "--evaluator",
    "evals.questions.samples": "--items",
    "evals.questions.prose": "--prose",
    "evals.questions.qa_1": "--qa_1",
    "evals.questions.qa_2": "--qa_2",
    "evals.questions.data": "--data",
    "data.chat_template": "--chat_template",
    "endpoint.url": "--endpoint",
    "endpoint.concurrency": "--concurrency",
    "endpoint.timeout": "--timeout",
}
"""The settings of an evaluation as this command's flags."""


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "checkpoint", None, "a run's workdir, one of its checkpoints, a Hugging Face folder or a GGUF file", flag_values=values
    )
    flags.DEFINE_string("endpoint", None, "in place of a checkpoint, a server such as http://localhost:8000/v1", flag_values=values)
    flags.DEFINE_string("model", None, "the endpoint's name of the model", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "the tokenizer of the endpoint's model", flag_values=values)
    flags.DEFINE_enum("api", "tokens", ["tokens", "text", "chat"], "what is sent to the endpoint", flag_values=values)
    flags.DEFINE_integer("concurrency", 4, "requests to the endpoint at a time", flag_values=values)
    flags.DEFINE_float("timeout", 600.0, "seconds that an answer of the endpoint may take", flag_values=values)
    flags.DEFINE_string("stage", None, "use the weights from the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_integer("step", None, "use the weights from this step", flag_values=values)
    flags.DEFINE_multi_string("positions", [], "positional scheme to try zero-shot, such as yarn:factor=16", flag_values=values)
    flags.DEFINE_list("lengths", None, "lengths in tokens, as in 256,4K,1M (default: 256 to 4K)", flag_values=values)
    flags.DEFINE_list(
        "tasks",
        list(EvalConfig().tasks),
        "what to measure: names in docs/evaluation.md",
        flag_values=values,
    )
    flags.DEFINE_integer("items", 20, "needles and questions at each length and depth", lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        "generation_items", 0, "needles per cell to answer by generation as well", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer("perplexity_tokens", 1 << 16, "held-out tokens to score at each length", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("prompt_format", "auto", ["auto", "base", "chat"], "how questions in words are asked", flag_values=values)
    flags.DEFINE_multi_string(
        "prose", [], "text files to hide answers in, as a pattern (default: Python's own)", flag_values=values
    )
    flags.DEFINE_string("qa_1", None, "questions of ruler_qa_1, in SQuAD's layout", flag_values=values)
    flags.DEFINE_string("qa_2", None, "questions of ruler_qa_2, in HotpotQA's layout", flag_values=values)
    flags.DEFINE_string(
        "data", None, "folder with the files of a benchmark that reads files, such as longbench", flag_values=values
    )
    flags.DEFINE_string(
        "evaluator", None, "the model that names key tokens of long_perplexity (default: itself)", flag_values=values
    )
    flags.DEFINE_bool("faithful", False, "keep the quirks of RULER v1", flag_values=values)
    flags.DEFINE_string("chat_template", None, "a file with another chat template (jinja2)", flag_values=values)
    config_flags.define_dtype(values)
    flags.DEFINE_string("label", None, "write the result to eval/<label>.json in the run's workdir", flag_values=values)
    distributed_flags.define(values)


@naming(FLAGS)
def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Evaluate."""
    parse.nothing_left(rest, "eval", "checkpoint")
    lengths = EvalConfig().lengths if values.lengths is None else tuple(parse.lengths(values))
    evals = EvalConfig(
        tasks=tuple(values.tasks),
        lengths=lengths,
        needle_items=values.items,
        zero_shot=tuple(values.positions),
        zero_shot_items=values.items,
        generation_items=values.generation_items,
        perplexity_tokens=values.perplexity_tokens,
        evaluator=values.evaluator,
        questions=QuestionConfig(
            values.items, values.prompt_format, tuple(values.prose), values.qa_1, values.qa_2, values.data, values.faithful
        ),
    )
    chosen_tasks(evals)
    if not evals.tasks:
        raise UserError("--tasks= is empty; name what to measure, such as --tasks=ruler, or leave the flag out")
    if not values.items and not values.generation_items and not values.perplexity_tokens:
        raise UserError("--items=0 and --perplexity_tokens=0 leave nothing to measure; raise one of them")
    if values.label == "":
        raise UserError("--label= is empty; name the result, or leave the flag out")
    if values.label is not None and values.label != _file_name(values.label):
        raise UserError(
            f"--label={values.label} cannot be a file's name; take one of letters, digits, and . = - _, or leave the flag out"
        )
    if values.endpoint is not None:
        _endpoint(values, evals)
        return
    for name in ("model", "tokenizer", "api", "concurrency", "timeout"):
        if values[name].present:
            raise UserError(f"--{name} belongs to --endpoint, which is not given; add it or leave --{name} out")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir, a Hugging Face folder or a GGUF file, or an --endpoint")
    if values.label in ("before", "after"):
        raise UserError(f"--label={values.label} is reserved for the evaluations of lcx run; choose another")
    loaded = models.load(checkpoint, values.step, values.stage, evaluation_mesh(checkpoint), values.dtype)
    usual = "-".join([values.stage or models.short_name(checkpoint, loaded), *values.positions])
    workdir = models.workdir_of(checkpoint)
    if values.chat_template is not None:
        data = dataclasses.replace(loaded.run.data, chat_template=values.chat_template)
        loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, data=data))
    others = {"chat_template": loaded.run.data.chat_template, **settings_of(loaded.params, loaded.run.execution)}
    label = _label(workdir, values.label, usual, evals, loaded.meta.step, others)
    evaluate_loaded(loaded, evals, label, workdir)
    say(f"result: {workdir / 'eval' / (label + '.json')}")


def _endpoint(values: flags.FlagValues, evals: EvalConfig) -> None:
    for name in ("checkpoint", "stage", "step"):
        if values[name].value is not None:
            raise UserError(f"--{name} and --endpoint conflict; give only one of them")
    if values.dtype != models.AUTO:
        raise UserError(f"--dtype={values.dtype} needs a checkpoint; a server has chosen its own")
    if values.positions:
        raise UserError(f"--positions={values.positions[0]} needs a checkpoint; a server has its own positions")
    if values["tasks"].using_default_value:
        raise UserError("--tasks is missing; a server answers questions in words, such as --tasks=ruler")
    model = parse.needed(values, "model", "the endpoint's name of the model")
    tokenizer = parse.needed(values, "tokenizer", "the folder of the model's tokenizer, to fit prompts to a length")
    endpoint = EndpointConfig(values.endpoint, model, values.api, values.concurrency, values.timeout)
    workdir = Path("runs") / _file_name(model)
    others = {"chat_template": values.chat_template, "endpoint": configs.plain(endpoint)}
    label = _label(workdir, values.label, "endpoint", evals, None, others)
    data = DataConfig(tokenizer=tokenizer, chat_template=values.chat_template)
    evaluate_endpoint(endpoint, data, evals, label=label, workdir=workdir)
    say(f"result: {workdir / 'eval' / (label + '.json')}")


def _label(workdir: Path, given: str | None, usual: str, evals: EvalConfig, step: int | None, others: Mapping[str, object]) -> str:
    """The name of the result: the one that was given, which must not be another result's, or the usual one with a number."""
    if given is None:
        return free_label(workdir, _file_name(usual), evals, **others)
    if not is_free(workdir, given, evals, step, **others):
        raise UserError(f"--label={given}: {workdir / 'eval' / given}.json holds another evaluation; choose another, or delete it")
    return given


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text).lstrip(".") or "eval"
