"""Cross-checks of a run against its devices and its model, made before anything is compiled or read."""

from __future__ import annotations

from jax.sharding import Mesh

from lcx.attention.parallel.sequence_layout import check_length
from lcx.attention.parallel.ulysses import check_heads
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.mesh import RULES, axis_size, check_divides, multiples
from lcx.core.param_spec import abstract, paths_of
from lcx.core.trees import Tree
from lcx.data.loader import Loader
from lcx.data.sources.documents import describe
from lcx.model.architecture import row_layout
from lcx.model.config import ModelConfig
from lcx.training.optimizer import check_patterns
from lcx.training.stages import RunConfig, StageConfig


def check_stage(run: RunConfig, stage: StageConfig, mesh: Mesh, specs: Tree) -> None:
    """Raises `UserError` when the sizes of a stage do not fit its mesh."""
    check_patterns(run.optim_of(stage), abstract(specs), run.adapters)
    check_batch(stage, mesh)
    check_divides(f"stages.{stage.name}.seq_len", stage.seq_len, mesh, "sequence")
    layout = row_layout(run.model, run.execution, stage.seq_len, mesh)
    check_length(f"stages.{stage.name}.seq_len", stage.seq_len, layout, mesh.shape["ring"])
    check_heads(run.model.num_heads // mesh.shape["tensor"], mesh.shape["ulysses"])
    check_model(run.model, mesh)
    check_execution(run, stage, mesh)
    if stage.shifted_group is not None:
        check_shifted(run, stage, mesh)
    for path, spec in paths_of(specs):
        for size, name in zip(spec.shape, spec.logical_axes, strict=True):
            if name is not None:
                check_divides(f"{name} dimension of {path}", size, mesh, name)


def check_execution(run: RunConfig, stage: StageConfig, mesh: Mesh) -> None:
    """Raises `UserError` for an option of memory or parallelism that would have no effect on a stage."""
    execution, periods = run.execution, run.model.num_layers // len(run.model.pattern)
    if execution.head_groups is not None and axis_size(mesh, "sequence") == 1:
        raise UserError(
            f"execution.head_groups={execution.head_groups} is for rows that are split over devices, but stages.{stage.name} has "
            "mesh.context=1; raise that, or leave head_groups out"
        )
    if execution.context_layout == "balanced" and mesh.shape["ring"] == 1:
        raise UserError(
            f"execution.context_layout=balanced deals documents to the devices of a ring, but stages.{stage.name} has "
            f"mesh.context={axis_size(mesh, 'sequence')} with mesh.ulysses={mesh.shape['ulysses']}; raise context, or take auto"
        )
    if execution.nested and (periods < 2 or (execution.remat_every or 2) > periods):
        raise UserError(
            f"execution.remat={execution.remat} recomputes several periods of layers together, with "
            f"remat_every={execution.remat_every}, but the model has {periods}; use block, or fewer periods at a time"
        )
    if execution.at_once(stage.seq_len) < stage.seq_len:
        check_recurrent(run, stage, mesh)


def check_recurrent(run: RunConfig, stage: StageConfig, mesh: Mesh) -> None:
    """Raises `UserError` for what cannot be computed in chunks of a row."""
    chunk = run.execution.at_once(stage.seq_len)
    said = f"execution.recurrent_chunk={chunk}"
    if mesh.size > 1:
        raise UserError(
            f"{said} walks a row on one device, but stages.{stage.name} has a mesh of {mesh.size}; use one device, or leave "
            "recurrent_chunk out and split rows by mesh.context"
        )
    if stage.seq_len % chunk:
        raise UserError(
            f"stages.{stage.name}.seq_len={stage.seq_len} must be divisible by {said}; try {multiples(stage.seq_len, chunk)}"
        )
    if stage.shifted_group is not None:
        raise UserError(
            f"{said} is for attention to whole rows, but stages.{stage.name} has shifted_group={stage.shifted_group}; leave one of "
            "them out"
        )
    if run.model.router_aux_weight:
        raise UserError(
            f"{said} computes a chunk at a time, but the experts' balance is that of whole rows; set "
            f"model.router_aux_weight={run.model.router_aux_weight} to 0, or leave recurrent_chunk out"
        )


def check_shifted(run: RunConfig, stage: StageConfig, mesh: Mesh) -> None:
    """Raises `UserError` where heads cannot be split into two halves."""
    for axis in ("tensor", "ulysses"):
        if mesh.shape[axis] > 1:
            raise UserError(
                f"stages.{stage.name}.shifted_group splits the heads, and so does mesh.{axis}={mesh.shape[axis]}; use mesh.fsdp "
                "or a ring (mesh.context with mesh.ulysses=1)"
            )
    if run.model.num_heads < 2:
        raise UserError(
            f"stages.{stage.name}.shifted_group splits the heads, but model.num_heads={run.model.num_heads}; leave it out"
        )


def check_batch(stage: StageConfig, mesh: Mesh) -> None:
    """Raises `UserError` unless the rows divide over microbatches and the mesh axes of the batch."""
    pieces = axis_size(mesh, "batch")
    unit = pieces * stage.accumulate
    if stage.batch_size % unit:
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES["batch"])
        raise UserError(
            f"stages.{stage.name}.batch_size={stage.batch_size} must be divisible by {unit} ({axes} x "
            f"accumulate={stage.accumulate}); nearest: {multiples(stage.batch_size, unit)}"
        )


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """Raises `UserError` unless the model's sizes divide over the mesh axes that split them, and for what no row makes use of."""
    if model.prefix_attention:
        raise UserError("model.prefix_attention=True has no effect, as no part of the data marks a prefix; leave it out")
    for field, logical in (
        ("num_heads", "heads"),
        ("num_kv_heads", "kv_heads"),
        ("mlp_dim", "mlp"),
        ("vocab_size", "vocab"),
        ("model_dim", "embed"),
    ):
        check_divides(f"model.{field}", getattr(model, field), mesh, logical)
    if model.num_experts is not None:
        check_divides("model.num_experts", model.num_experts, mesh, "experts")


def check_vocabulary(model: ModelConfig, vocab_size: int, tokenizer: str) -> None:
    """Raises `UserError` unless the tokenizer's ids fit the model's embedding table."""
    if model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is below the {vocab_size} tokens of data.tokenizer={tokenizer!r}; "
            f"set it to at least {vocab_size}"
        )


MOST_REPEATS = 4
"""Readings of a text after which reading it again teaches clearly less than new text (arXiv:2305.16264)."""


def warn_repeats(stage: StageConfig, loader: Loader) -> None:
    """Warn, in one sentence for the stage, of sources whose documents are read more than `MOST_REPEATS` times in it."""
    found = [
        f"{describe(source)} ({', '.join(names)}) {times:,.1f} times"
        for source, (times, names) in loader.repeats(stage.steps).items()
        if times > MOST_REPEATS
    ]
    if found:
        warn(
            f"stages.{stage.name} reads {' and '.join(found)}; beyond {MOST_REPEATS} repeats a text teaches ever less: "
            f"add documents, lower its weight in stages.{stage.name}.mixture, raise short_keep, or train fewer steps"
        )


def warn_unusual(run: RunConfig) -> None:
    """Warn of settings that are allowed but rarely intended."""
    for before, stage in zip(run.stages, run.stages[1:], strict=False):
        if stage.seq_len < before.seq_len:
            warn(f"stages.{stage.name}.seq_len={stage.seq_len} is shorter than {before.name}'s {before.seq_len}")
        if stage.length > before.length and not stage.positions and not run.monitored(stage):
            warn(
                f"stages.{stage.name} is longer than {before.name} and keeps its positional scheme; "
                f"set stages.{stage.name}.positions"
            )
