"""Somebody's checkpoint extended to a target length: model, positions and stages of a run, worked out from what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from lcx.core import configs
from lcx.core.configs import not_negative, positive
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, fast_dtype
from lcx.data.config import PackingConfig
from lcx.evals.config import EvalConfig
from lcx.interop.hf_config import Described
from lcx.model.config import is_local
from lcx.positions.rotary import Rope
from lcx.positions.theta import critical_base
from lcx.recipes import models, recipe
from lcx.recipes.cores import share_heads
from lcx.recipes.merged import merged
from lcx.recipes.models import is_foreign, is_tokenizer_of, tokenizer_of
from lcx.training.meta import scheme_configs

ASKED = ("needle_in_prose", "key_value", "ruler_vt", "session_state", "many_shot", "perplexity", "loss_by_kind")
"""What a model that learns from questions in words is asked before and after, in words that it has not learned from."""


@dataclasses.dataclass(frozen=True)
class ExtensionConfig:
    """How a model is extended.

    `source`: a Hugging Face folder, a GGUF file, or the YAML file of a merge. `target`: length in tokens to reach, in stages each
    at most `growth` times longer than the one before; the first starts from `trained`, the length that the source was trained for
    (None: what it says).
    Every stage's theta is `theta_multiple` (None: 1) times the critical base of its length; `theta` fixes that of the last one
    instead. With `temperature_scale` a query with n keys before it is multiplied by 1 + `temperature_scale` ln(1 + ⌊n / length⌋),
    where `length` is `pose_tokens`, or `trained` for whole rows: attention stays sharp over more keys than were trained on (as in
    Ministral 3; None: it is not).
    `steps` of `tokens_per_step` tokens a stage, at least one row; `accumulate` microbatches a step. `pose_tokens`: rows of so many
    tokens stand for whole ones, their positions skip between `pose_chunks` chunks so that they reach the stage's length (PoSE,
    arXiv:2309.10400; None: whole rows). Parts that mask documents or reset positions keep theirs.
    After short rows `last_steps` steps of longer ones follow: rows of `last_tokens` (None: whole rows of the target).
    """

    source: str | None = None
    target: int | None = None
    trained: int | None = None
    growth: float = 4.0
    theta: float | None = None
    theta_multiple: float | None = None
    temperature_scale: float | None = None
    steps: int = 100
    tokens_per_step: int = 1 << 18
    accumulate: int = 1
    pose_tokens: int | None = None
    pose_chunks: int = 2
    last_steps: int = 0
    last_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.source is None:
            raise UserError("config.source is missing; name a Hugging Face folder with --config.source=PATH")
        if self.target is None:
            raise UserError("config.target is missing; give the length to reach, as in --config.target=65536")
        sizes = ("target", "trained", "steps", "tokens_per_step", "accumulate", "pose_tokens", "last_tokens")
        factors = ("theta", "theta_multiple", "temperature_scale")
        positive("config", **{name: getattr(self, name) for name in (*sizes, *factors)})
        if self.theta is not None and self.theta_multiple is not None:
            raise UserError(
                f"config.theta={self.theta:g} and config.theta_multiple={self.theta_multiple:g} both choose the last stage's "
                "theta; give one of them"
            )
        not_negative("config", last_steps=self.last_steps)
        if self.pose_tokens is None and self.last_steps:
            raise UserError(
                f"config.last_steps={self.last_steps} follow steps of shorter rows; give config.pose_tokens, or leave it out and "
                "set config.steps alone"
            )
        if self.last_tokens is not None and self.last_steps == 0:
            raise UserError(f"config.last_tokens={self.last_tokens} has no effect without config.last_steps; leave it out")
        if self.last_tokens is not None and not (self.pose_tokens or 0) < self.last_tokens <= self.target:
            raise UserError(
                f"config.last_tokens={self.last_tokens} must exceed config.pose_tokens={self.pose_tokens} and be at most "
                f"config.target={self.target}"
            )
        if self.pose_tokens is None and self.pose_chunks != 2:
            raise UserError(
                f"config.pose_chunks={self.pose_chunks} has no effect on whole rows; give config.pose_tokens, or leave it out"
            )
        if self.pose_tokens is not None and not 2 <= self.pose_chunks <= self.pose_tokens:
            raise UserError(f"config.pose_chunks={self.pose_chunks} must be between 2 and the {self.pose_tokens} tokens of a row")
        if self.pose_tokens is not None and self.pose_tokens >= self.target:
            raise UserError(
                f"config.pose_tokens={self.pose_tokens} must be below config.target={self.target}; lower it, or leave it out for "
                "whole rows"
            )
        if self.target > 2**31 - 1:
            raise UserError(f"config.target={self.target:,} exceeds the number of int32 positions; give at most {2**31 - 1:,}")
        if not self.growth > 1:
            raise UserError(f"config.growth={self.growth} must be above 1: every stage is longer than the one before")


def defaults() -> ml_collections.ConfigDict:
    """The fields of an extension and of everything else in a run but what `complete` finds out, for flags to change."""
    run = run_defaults()
    scalars = {"source": str, "target": int, "trained": int, "pose_tokens": int, "last_tokens": int}
    scalars |= {"theta": float, "theta_multiple": float, "temperature_scale": float}
    for field in dataclasses.fields(ExtensionConfig):
        run[field.name] = placeholder(scalars[field.name]) if field.name in scalars else field.default
    return run


def run_defaults() -> ml_collections.ConfigDict:
    """Everything in a run that begins with somebody's checkpoint but what follows from that checkpoint (`with_source`)."""
    run = recipe.defaults({"any": {"seq_len": 1, "steps": 1, "batch_size": 1, "monitor": False}})
    for name in ("stages", "stage_order", "base_stage", "positions", "init_from", "resume_from"):
        del run[name]
    run.model = ml_collections.ConfigDict({"router_aux_weight": run.model.router_aux_weight})
    # A model that exists bears the rounding; `with_source` finds out what this machine multiplies fast.
    run.execution.compute_dtype = models.AUTO
    run.optim.lr = 2e-5
    # Rows are few and long, so devices share a row before they share a batch.
    run.mesh.fsdp, run.mesh.context = 1, -1
    # Follow from the model and its lengths unless they are given.
    run.evals.lengths, run.evals.tasks = placeholder(tuple), placeholder(tuple)
    run.data.parts = ml_collections.ConfigDict({"text": recipe.part(weight=0.3), "task": recipe.part(weight=0.7)})
    run.data.parts.task.kind = placeholder(str)
    run.data.tokenizer = placeholder(str)
    return run


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The recipe of a config made by `defaults`: with model, positions, tokenizer, stages, evaluated lengths and type of numbers.

    Raises `UserError` for a source that can't be read and a target that does not exceed its length.
    """
    values = config.to_dict()
    names = [field.name for field in dataclasses.fields(ExtensionConfig)]
    wanted = configs.build(ExtensionConfig, {name: values.pop(name) for name in names}, "config")
    source, described = opened_source(str(wanted.source))
    trained = wanted.trained or described.length
    if wanted.target <= trained:
        raise UserError(f"config.target={wanted.target} must exceed the {trained} tokens that {source} was trained for")
    packing = {
        name: configs.build(PackingConfig, part.get("packing", {}), f"config.data.parts.{name}.packing")
        for name, part in values["data"]["parts"].items()
    }
    skipping = [name for name, how in packing.items() if how.is_plain]
    values["stages"] = _stages(wanted, described, trained, skipping, values["optim"]["warmup_steps"])
    reached = (stage.get("max_position", stage["seq_len"]) for stage in values["stages"])
    return with_source(values, source, described, (trained, *reached))


def opened_source(named: str) -> tuple[Path, Described]:
    """Path and description of the model that a config calls `named`; one that is to be merged is merged first."""
    source = merged(named)
    if not is_foreign(source):
        raise UserError(
            f"config.source={named!r} is not a Hugging Face model; the directory needs a config.json with a model_type, "
            "or name a .gguf file, or the .yml file of a merge"
        )
    return source, models.described(source)


def with_source(values: dict[str, Any], source: Path, described: Described, lengths: Sequence[int]) -> ml_collections.ConfigDict:
    """A recipe made by `run_defaults` with what follows from the model that it begins with and the lengths that it reaches."""
    values["model"] = {**configs.plain(described.model), **values["model"]}
    values["positions"] = scheme_configs(described.schemes)
    values["init_from"] = str(source)
    given = values["data"]["tokenizer"]
    if given is not None and not is_tokenizer_of(given, source):
        raise UserError(f"config.data.tokenizer={given!r} is not the tokenizer that {source} was trained with; leave it out")
    values["data"]["tokenizer"] = given or tokenizer_of(source, described.model)
    execution = values["execution"]
    # What this machine multiplies fast is known once JAX has started, and then its CPU can no longer be split.
    mesh = configs.build(MeshConfig, values["mesh"], "config.mesh")
    model = described.model
    share_heads(mesh, model.num_heads, model.num_kv_heads, [stage["seq_len"] for stage in values["stages"]])
    execution["compute_dtype"] = fast_dtype() if execution["compute_dtype"] == models.AUTO else execution["compute_dtype"]
    is_bytes = values["data"]["tokenizer"].startswith("bytes")
    task = values["data"]["parts"].get("task", {"kind": "text"})
    # Characters are tokens of a byte model alone; others learn from words, and are asked in words.
    task["kind"] = task["kind"] or ("multikey" if is_bytes else "questions")
    values["evals"]["tasks"] = values["evals"]["tasks"] or (EvalConfig().tasks if task["kind"] != "questions" else ASKED)
    values["evals"]["lengths"] = values["evals"]["lengths"] or tuple(dict.fromkeys(lengths))
    return ml_collections.ConfigDict(values)


def lengths(trained: int, target: int, growth: float) -> list[int]:
    """Lengths of the stages: as few as possible, each about `growth` times the one before at most, in equal ratios."""
    count = 1
    while trained * growth**count < target * (1 - 1e-9):
        count += 1
    # Round lengths divide over devices; of short ones rounding would be felt.
    unit = next(unit for unit in (128, 16, 1) if target % unit == 0 and (unit == 1 or 8 * unit <= trained))
    steps = (round(trained * (target / trained) ** (i / count) / unit) * unit for i in range(1, count))
    return sorted({step for step in steps if trained < step < target} | {target})


def _stages(
    wanted: ExtensionConfig, described: Described, trained: int, skipping: Sequence[str], warmup: int
) -> list[dict[str, Any]]:
    target = int(wanted.target or 0)
    stages = []
    for length in lengths(trained, target, wanted.growth):
        stage = _stage(wanted, length, wanted.pose_tokens, wanted.steps, skipping)
        stages.append({**stage, "positions": _positions(described, wanted, trained, length)})
    if wanted.last_steps:
        last = _stage(wanted, target, wanted.last_tokens, wanted.last_steps, skipping)
        # Moments go on as well, so a long warmup would be for nothing.
        optim = {"warmup_steps": min(warmup, wanted.last_steps // 10)}
        stages.append({**last, "optim": optim, "keep_optimizer_state": True})
    return stages


def _stage(wanted: ExtensionConfig, length: int, row: int | None, steps: int, skipping: Sequence[str]) -> dict[str, Any]:
    """A stage that reaches `length`, by rows of `row` tokens if that is less; positions of the parts `skipping` skip then."""
    row = min(length, row or length)
    stage = {"seq_len": row, "steps": steps, **rows_of(wanted.tokens_per_step, row, wanted.accumulate)}
    if row == length:
        return {"name": f"extend_{length}", **stage}
    remap = {"remap": "pose", "pose_chunks": wanted.pose_chunks}
    name = f"pose_{length}" if row == wanted.pose_tokens else f"pose_{length}_by_{row}"
    return {"name": name, **stage, "max_position": length, "parts": {part: dict(remap) for part in skipping}}


def rows_of(tokens_per_step: int, row: int, accumulate: int) -> dict[str, int]:
    """As many rows of `row` tokens as make a step, in microbatches of equal size: `StageConfig.batch_size` and `accumulate`."""
    rows = max(1, tokens_per_step // row)
    return {"batch_size": -(-rows // accumulate) * accumulate, "accumulate": accumulate}


def _positions(described: Described, wanted: ExtensionConfig, trained: int, length: int) -> dict[str, Any]:
    """A new theta, and a temperature if there is to be one, for every kind of layer that sees the whole context and has a theta."""
    rotary = {kind: scheme for kind, scheme in described.schemes.items() if not is_local(kind) and isinstance(scheme, Rope)}
    if not rotary:
        raise UserError(
            f"{wanted.source} has no layer with rotary positions that sees more than its window of {described.model.window} "
            "tokens, so there is nothing to extend"
        )
    last = wanted.theta if length == wanted.target else None
    multiple, scale = wanted.theta_multiple or 1.0, wanted.temperature_scale
    thetas = {kind: last or multiple * critical_base(scheme.theta, trained, length) for kind, scheme in rotary.items()}
    if scale is None:
        return thetas
    temperature = {"kind": "ministral", "scale": scale, "length": wanted.pose_tokens or trained}
    return {kind: {"theta": theta, "temperature": temperature} for kind, theta in thetas.items()}
