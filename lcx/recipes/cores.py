"""On a CPU alone, the cores share a model's heads, one device each, where nothing says how to compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from lcx.core import host_devices, processes
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.recipes import models
from lcx.training.loading import config_of, locate
from lcx.training.stages import RunConfig


def share_heads(mesh: MeshConfig, num_heads: int, num_kv_heads: int, lengths: Sequence[int]) -> None:
    """Split the CPU for a run of such a mesh, model and lengths of rows, if one device would do for it and JAX has not started."""
    try:
        mesh.sizes(1)
    except UserError:
        return
    host_devices.share(num_heads, num_kv_heads, lengths)


def on_cores(run: RunConfig) -> RunConfig:
    """The run as it is computed on this machine: over the devices that share its heads, where there are such; says so."""
    # A row that is walked in chunks is on one device.
    walked = any(run.execution.at_once(stage.seq_len) < stage.seq_len for stage in run.stages)
    if all(stage.mesh is None for stage in run.stages) and not walked:
        share_heads(run.mesh, run.model.num_heads, run.model.num_kv_heads, [stage.seq_len for stage in run.stages])
    mesh = _mesh()
    return run if mesh is None else dataclasses.replace(run, mesh=mesh)


def evaluation_mesh(path: str | Path) -> Mesh | None:
    """Where the weights of a model are evaluated: as all processes of a job do, else on devices that share its heads; None: on
    one."""
    if processes.count() > 1:
        return models.job_mesh(path)
    run = None if models.is_foreign(path) else config_of(locate(Path(path))[0])
    model = models.described(Path(path)).model if run is None else run.model
    if run is None or run.execution.recurrent_chunk is None:
        host_devices.share(model.num_heads, model.num_kv_heads, ())
    mesh = _mesh()
    return None if mesh is None else make_mesh(mesh)


def _mesh() -> MeshConfig | None:
    count = host_devices.sharing()
    if count == 1:
        return None
    say(f"{count} CPU devices share the heads (--host_devices=1 for one device)")
    return MeshConfig(fsdp=1, context=count, ulysses=count)
