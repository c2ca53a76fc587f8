"""Evaluate a checkpoint with EleutherAI's harness (lm_eval): its tasks, prompts and scores, answered by a model of lcx.

lcx harness --checkpoint=models/SmolLM2-135M-Instruct --tasks=niah_single_1,niah_multikey_2 --lengths=4096 --limit=20
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import config_flags, parse
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.data.chat import chat
from lcx.data.tokenizers import tokenizers
from lcx.evals import zero_shot
from lcx.evals.backends.local import LocalBackend
from lcx.recipes import models
from lcx.recipes.recipe import backend_of
from lcx.report import markdown


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "checkpoint", None, "a run's workdir, one of its checkpoints, a Hugging Face folder or a GGUF file", flag_values=values
    )
    flags.DEFINE_string("stage", None, "use the weights from the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_integer("step", None, "use the weights from this step", flag_values=values)
    flags.DEFINE_string("positions", "none", "positional scheme to use zero-shot, such as yarn:factor=16", flag_values=values)
    flags.DEFINE_list("tasks", None, "tasks or groups of lm_eval", flag_values=values)
    flags.DEFINE_string("include", None, "a folder with YAML files of tasks of your own", flag_values=values)
    flags.DEFINE_integer("length", None, "the most tokens of a context (default: as trained, or --lengths)", flag_values=values)
    flags.DEFINE_list("lengths", [], "lengths in tokens of tasks that make prompts themselves, as ruler does", flag_values=values)
    flags.DEFINE_integer("limit", None, "documents of each task (default: all)", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("shots", None, "examples in each prompt (default: the task's own)", lower_bound=0, flag_values=values)
    flags.DEFINE_enum("prompt_format", "base", ["base", "chat"], "whether prompts are a turn of a chat", flag_values=values)
    config_flags.define_dtype(values)
    flags.DEFINE_string("label", "harness", "the result is eval/harness/<label>.json in the run's workdir", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Evaluate."""
    parse.nothing_left(rest, "harness", "checkpoint")
    # Before any weights are read.
    library("lm_eval", "lcx harness", "harness")
    from lcx.evals import harness

    tasks = parse.needed(values, "tasks", "name tasks of lm_eval, such as niah_single_1; `lm_eval ls tasks` lists them")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir, a Hugging Face folder or a GGUF file")
    include = None if values.include is None else Path(values.include).expanduser()
    if include is not None and not include.is_dir():
        raise UserError(f"--include={values.include} is not a folder; name one with YAML files of tasks")
    lengths = parse.lengths(values)
    zero_shot.check(values.positions, "--positions")
    loaded = models.load(checkpoint, step=values.step, stage=values.stage, dtype=values.dtype)
    run = loaded.run
    length = max([loaded.meta.length, *lengths]) if values.length is None else values.length
    if length < max([2, *lengths]):
        raise UserError(f"--length={length} must be at least {max([2, *lengths]):,}, the longest of --lengths")
    tokenizer = tokenizers.load(run.data.tokenizer)
    if values.prompt_format == "chat":
        chat.load(tokenizer, run.data.chat_template)

    @functools.cache
    def backend(size: int) -> LocalBackend:
        return backend_of(loaded, size, values.positions, length)

    folder = models.workdir_of(checkpoint) / "eval" / "harness"
    with tempfile.TemporaryDirectory() as written:
        own = tokenizer.folder
        if own is None:
            own = Path(written)
            models.write_tokenizer(run.data.tokenizer, tokenizer, own)
        results = harness.run(
            harness.HarnessModel(backend, tokenizer, length, run.data.chat_template), tasks,
            metadata={"tokenizer": str(own), **({"max_seq_lengths": lengths} if lengths else {})}, include=include,
            limit=values.limit, shots=values.shots, use_chat_template=values.prompt_format == "chat",
            answers=folder / f"answers-{backend(length).fingerprint}-{length}",
        )  # fmt: skip
    rows = (
        (task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
        for task, metric, value, error in harness.scores(results)
    )
    say(markdown.table(("task", "metric", "value", "standard error"), rows))
    say(f"result: {harness.write(results, folder, values.label)}, beside it all samples")
