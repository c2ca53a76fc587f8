"""The lcx side: the training step that `lcx run` takes, on one device or on host devices that share the heads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from side import MODEL, NORM_EPS, OPTIMIZER, THETA, batches, serve

from lcx.core.batch import Batch
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.positions.rotary import Rope
from lcx.training.optimizer import OptimConfig
from lcx.training.step import train_step


def build(rows: int, length: int, devices: int = 1) -> tuple[Callable[[], float], dict[str, Any]]:
    """The compiled, donated step in float32; each call moves a batch from the host and waits for its loss."""
    config = ModelConfig(**MODEL, norm_eps=NORM_EPS)
    schemes = {"global": Rope(theta=THETA)}
    arch, buffers = build_architecture(config, ExecutionConfig(), schemes, length)
    mesh = make_mesh(MeshConfig(fsdp=1, context=devices, ulysses=devices), jax.devices()[:devices])
    step = train_step(arch, specs(config, schemes, length), OptimConfig(schedule="constant", **OPTIMIZER), 10**6, mesh)
    state = step.init_state(jax.random.key(0))
    host = map(host_batch, batches(rows, length))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, step.to_device(next(host), rows), buffers)
        return metrics["loss"].item()

    return run, {"parameters": parameters, "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}}


def host_batch(tokens: np.ndarray) -> Batch:
    """Rows `[B, T + 1]` as NumPy arrays, one document each, as the loader hands them over."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    order = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((rows, length), np.float32), order, order, np.ones_like(order))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", json.loads(sys.argv[1])["devices"])
    serve(build)
