"""Does a stage fit into memory? Asked before anything is read, by arithmetic, and of its compiled step before the first one runs.

All sizes are bytes on one device. Devices of one host's CPU share its memory, so each has its part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.host import available_memory
from lcx.core.mesh import axis_size
from lcx.core.numbers import size
from lcx.core.trees import Tree, paths
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.training.stages import RunConfig, StageConfig
from lcx.training.step import TrainStep

REFUSED, NEAR = 1.1, 0.9
"""Shares of what there is from which a stage is refused, and warned of: allocators and other programs take some, too."""


def room(mesh: Mesh, whole: bool = False) -> int | None:
    """What each of this process's devices of a mesh has left, or, if `whole`, what an accelerator has in all; None if none says."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if not local:
        return None
    if local[0].platform == "cpu":
        return available_memory() // len(local)
    found = [stats for device in local if (stats := device.memory_stats())]
    left = [stats["bytes_limit"] - (0 if whole else stats.get("bytes_in_use", 0)) for stats in found if "bytes_limit" in stats]
    return min(left, default=None)


def least(run: RunConfig, stage: StageConfig, step: TrainStep) -> dict[str, int]:
    """What a step needs at the very least, by what it is for, at the fuller of two moments: as the loss is computed, and as the
    gradients are complete."""
    state = step.abstract_state()
    held = {
        "parameters": _bytes([state.params, state.frozen]),
        "optimizer state": _bytes(state.opt_state),
    }
    gradients = sum(_size(leaf) * 4 for leaf in jax.tree.leaves(state.params))
    rows = stage.batch_size // stage.accumulate
    model, execution = run.model, run.execution
    length = execution.at_once(stage.seq_len)
    tokens = rows * length // (axis_size(step.mesh, "batch") * axis_size(step.mesh, "sequence"))
    if length < stage.seq_len and step.mesh.devices.flat[0].platform == "cpu":
        held["keys, values and their gradients"] = int(key_bytes(model, execution, rows, stage.seq_len))
    logits = 4 * min(tokens * model.vocab_size, execution.loss_tile)
    at_loss = {"logits": logits}
    if "offload" not in execution.remat and any(path.startswith("layers/") for path, _ in paths(state.params)):
        periods = model.num_layers // len(model.pattern)
        every = execution.periods_together(periods) if periods > 1 else 1
        kept = model.num_layers if every == 1 else periods // every
        at_loss["inputs of the layers"] = kept * tokens * model.model_dim * jnp.dtype(execution.compute_dtype).itemsize
    if stage.accumulate > 1 or length < stage.seq_len:
        at_loss["gradients"] = gradients
    return held | max({"gradients": gradients}, at_loss, key=lambda part: sum(part.values()))


def key_bytes(model: ModelConfig, execution: ExecutionConfig, rows: float, length: int) -> float:
    """Bytes of the keys and values of all layers, and of their gradients in float32, which `execution.recurrent_chunk` keeps."""
    width = jnp.dtype(execution.compute_dtype).itemsize + 4
    return 2 * width * model.num_layers * rows * length * model.num_kv_heads * model.head_dim


def check_least(run: RunConfig, stage: StageConfig, step: TrainStep) -> None:
    """Raises `UserError` for a stage that cannot fit whatever its program does."""
    there, need = room(step.mesh, whole=True), least(run, stage, step)
    if there is not None and sum(need.values()) > REFUSED * there:
        raise UserError(
            f"{_need(stage, step.mesh, need, 'at least ')}, but there are {size(there)}; {_ways(run, stage, step.mesh)}"
        )


def check_program(run: RunConfig, stage: StageConfig, step: TrainStep, program: jax.stages.Compiled) -> None:
    """Raises `UserError` if the compiled step of a stage needs clearly more than what is free besides its arguments, which are in
    place; warns if it comes near."""
    found, free = program.memory_analysis(), room(step.mesh)
    if found is None or free is None:
        return
    new = bytes_beside_arguments(found)
    need = {"its arguments": found.argument_size_in_bytes, "results of its layers and other temporaries": new}
    if new <= NEAR * free:
        return
    there = size(free + found.argument_size_in_bytes)
    said, ways = _need(stage, step.mesh, need), _ways(run, stage, step.mesh)
    if new > REFUSED * free:
        raise UserError(f"{said}, but there are {there}; {ways}")
    warn(f"{said}, and there are {there}, so the run may be killed for want of memory; {ways}")


def bytes_beside_arguments(found: Any) -> int:
    """What a program needs besides its arguments by its `memory_analysis`: temporaries, and results that are not in their place."""
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def _need(stage: StageConfig, mesh: Mesh, need: Mapping[str, int], how: str = "") -> str:
    parts = ", ".join(f"{name} {size(count)}" for name, count in need.items())
    where = " of memory" if mesh.size == 1 else f" on each of {mesh.size} devices"
    return f"stages.{stage.name}: a step of {stage.seq_len:,} tokens a row needs {how}{size(sum(need.values()))}{where} ({parts})"


def _ways(run: RunConfig, stage: StageConfig, mesh: Mesh) -> str:
    """What may help."""
    ways = ["shorter rows"]
    if stage.batch_size > stage.accumulate:
        ways.append("more microbatches (accumulate)")
    if not run.execution.nested:
        periods = run.model.num_layers // len(run.model.pattern)
        ways.append("execution.remat=nested" if periods > 4 else "execution.remat=block")
    if run.execution.compute_dtype == "float32":
        ways.append("execution.compute_dtype=bfloat16")
    if run.adapters is None and run.init_from is not None:
        ways.append("adapters in place of the whole model (lora.rank=16)")
    elif run.adapters is not None and (narrower := {"float32": "bfloat16", "bfloat16": "nf4"}.get(run.lora.base_dtype)):
        ways.append(f"lora.base_dtype={narrower}")
    ways.append("a larger machine" if mesh.devices.flat[0].platform == "cpu" else "more devices")
    return f"try {', '.join(ways[:-1])} or {ways[-1]}"


def _bytes(tree: Tree) -> int:
    return sum(_size(leaf) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _size(leaf: Any) -> int:
    """Elements of an abstract array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
