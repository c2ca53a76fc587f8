"""The lcx side: a step of a SmolLM2-135M from random weights, in full or by adapters."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
from lcx_side import host_batch
from side import NORM_EPS, OPTIMIZER, batches, serve

from lcx.adapters import lora
from lcx.adapters.lora import LoraConfig
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import initialize
from lcx.core.trees import paths
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.positions.rotary import Rope
from lcx.training.optimizer import OptimConfig
from lcx.training.step import train_step


def build(
    sizes: dict[str, int], theta: float, length: int, rank: int | None, alpha: float, dtype: str, remat: str, base_dtype: str
) -> tuple[Callable[[], float], dict[str, Any]]:
    """The compiled, donated step, computed in `dtype` on one device; each call moves a row from the host and waits for its loss."""
    config = ModelConfig(**sizes, norm_eps=NORM_EPS, tied_embeddings=True)
    schemes = {"global": Rope(theta=theta)}
    arch, buffers = build_architecture(config, ExecutionConfig(compute_dtype=dtype, remat=remat), schemes, length)
    table = specs(config, schemes, length)
    adapters = None if rank is None else LoraConfig(rank=rank, alpha=alpha, base_dtype=base_dtype)
    table = table if adapters is None else lora.specs(table, adapters, tied_embeddings=True)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    step = train_step(arch, table, OptimConfig(schedule="constant", **OPTIMIZER), 10**6, mesh, 1, adapters)
    state = step.state_from_params(initialize(table, jax.random.key(0)))
    host = map(host_batch, batches(1, length))
    counts = {"parameters": state.all_params, "trained": state.params}
    # The other side's factors are no parameters.
    facts = {name: sum(x.size for path, x in paths(tree) if not lora.is_constant(path)) for name, tree in counts.items()}

    def run() -> float:
        nonlocal state
        state, metrics = step(state, step.to_device(next(host), 1), buffers)
        return metrics["loss"].item()

    return run, {**facts, "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}}


if __name__ == "__main__":
    serve(build, warm=0)
