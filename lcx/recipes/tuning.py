"""Somebody's checkpoint, or a merge of several, trained a little more at its own length."""

from __future__ import annotations

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from lcx.core import configs
from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.recipes import extension


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a model is trained further.

    `source`: a Hugging Face folder, a GGUF file, or the YAML file of a merge. `seq_len`: tokens of a row (None: the length that
    the source says it was trained for). `steps` of `tokens_per_step` tokens, at least one row; `accumulate` microbatches a step.
    """

    source: str | None = None
    seq_len: int | None = None
    steps: int = 50
    tokens_per_step: int = 1 << 18
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.source is None:
            raise UserError("config.source is missing; name a merge's YAML file or a Hugging Face folder with --config.source=PATH")
        names = ("seq_len", "steps", "tokens_per_step", "accumulate")
        positive("config", **{name: getattr(self, name) for name in names})


def defaults() -> ml_collections.ConfigDict:
    """The fields of `TuningConfig` and of everything else in a run but what `complete` finds out, for flags to change."""
    run = extension.run_defaults()
    for field in dataclasses.fields(TuningConfig):
        kind = {"source": str, "seq_len": int}.get(field.name)
        run[field.name] = field.default if kind is None else placeholder(kind)
    return run


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The recipe of a config made by `defaults`: with model, positions, tokenizer, the stage, and evaluated lengths.

    A merge is written first. Raises `UserError` for a source that cannot be read and rows longer than it was trained for.
    """
    values = config.to_dict()
    names = [field.name for field in dataclasses.fields(TuningConfig)]
    wanted = configs.build(TuningConfig, {name: values.pop(name) for name in names}, "config")
    source, described = extension.opened_source(str(wanted.source))
    length = wanted.seq_len or described.length
    if length > described.length:
        raise UserError(
            f"config.seq_len={length} exceeds the {described.length} tokens that {source} was trained for; lower it, or extend the "
            f"model with configs/extend_hf.py --config.target={length}"
        )
    rows = extension.rows_of(wanted.tokens_per_step, length, wanted.accumulate)
    stage = {"name": f"tune_{length}", "seq_len": length, "steps": wanted.steps, **rows}
    if length < described.length:
        stage["max_position"] = described.length
    values["stages"] = [stage]
    return extension.with_source(values, source, described, (length,))
