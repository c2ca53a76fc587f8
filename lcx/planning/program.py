"""The step of a stage as a program that can be traced and compiled for devices that are not there.

What `training.builder` builds, without a corpus, weights or a workdir.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lcx.core.batch import Batch
from lcx.core.mesh import AXES, MeshConfig, make_mesh, named_sharding, slices_spanned
from lcx.core.trees import Tree
from lcx.model.architecture import build_architecture, build_schemes, row_layout
from lcx.positions.registry import from_config
from lcx.positions.scheme import Scheme
from lcx.training.checks import check_stage
from lcx.training.stages import RunConfig, StageConfig, override
from lcx.training.step import TrainStep, train_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A stage's step over a mesh, with abstract arguments."""

    run: RunConfig
    stage: StageConfig
    mesh: Mesh
    step: TrainStep
    buffers: Tree

    def traced(self) -> jax.stages.Traced:
        """The step's jaxpr, which can be lowered and compiled; nothing has been computed."""
        return self.step.trace(self.step.abstract_state(), self.batch(), self.buffers)

    def batch(self) -> Batch:
        """A step's batch as `ShapeDtypeStruct`s, as the loader makes it."""
        stage, mesh = self.stage, self.mesh
        rows, length = stage.batch_size, stage.seq_len

        def tokens(dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((rows, length), dtype, sharding=named_sharding(mesh, ("batch", "sequence")))

        parts: Any = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=named_sharding(mesh, ("batch",)))
        layout = row_layout(self.run.model, self.run.execution, length, mesh)
        count = sum(part.weight > 0 for part in self.run.data_of(stage).parts.values())
        return Batch(
            tokens(), tokens(), tokens(jnp.float32), tokens(), tokens(), tokens(), row_parts=parts, layout=layout, num_parts=count
        )


def schemes_at(run: RunConfig, index: int) -> dict[str, Scheme]:
    """The schemes of stage `index` as configured: those of the monitor would have another theta, which no program depends on."""
    current = {kind: from_config(spec, f"positions.{kind}") for kind, spec in run.positions.items()}
    before: int | None = None
    for stage in run.stages[: index + 1]:
        current = override(current, stage, before)
        before = stage.length
    return current


def sizes_over(run: RunConfig, index: int, devices: int, slices: int = 1, config: MeshConfig | None = None) -> dict[str, int]:
    """Sizes of the mesh of stage `index`, or of another `config`, over so many devices, which may be those of several TPU slices.

    Raises `UserError` where the stage does not divide over them.
    """
    stage = run.stages[index]
    config = config or run.mesh_of(stage)
    sizes = config.sizes(devices)
    slices_spanned(sizes, slices, config.context_over_slices)
    abstract: Any = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    check_stage(run, stage, abstract, run.specs(schemes_at(run, index), stage.length))
    return sizes


def build(run: RunConfig, index: int, devices: Sequence[Any]) -> StepProgram:
    """The program of stage `index` over devices, which may be those of a slice that is not there.

    Raises `UserError` where the stage does not divide over them.
    """
    stage = run.stages[index]
    mesh = make_mesh(run.mesh_of(stage), devices)
    schemes = schemes_at(run, index)
    table = run.specs(schemes, stage.length)
    check_stage(run, stage, mesh, table)
    arch, buffers = build_architecture(
        run.model, run.execution, build_schemes(run.model, schemes), stage.length, stage.shifted_group
    )
    step = train_step(arch, table, run.optim_of(stage), stage.steps, mesh, stage.accumulate, run.adapters)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), buffers)
    return StepProgram(run, stage, mesh, step, abstract)
