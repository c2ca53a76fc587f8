"""Compiles a training step of Llama 3 8B's layers for a TPU that is not here, and prints the bytes that a chip needs, as JSON.

    python -m tests.training.ahead v5p:2x2x1 1048576 --layers=2 --remat=nested

A process of its own, because what libtpu cannot compile may end it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lcx.core.batch import Batch
from lcx.core.mesh import MeshConfig, make_mesh, named_sharding
from lcx.model.architecture import build_architecture, build_schemes, row_layout
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.params import specs
from lcx.training.optimizer import OptimConfig
from lcx.training.step import train_step

LIBRARY = Path(os.environ.get("TPU_LIBRARY_PATH", Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"))
LLAMA = ModelConfig(
    vocab_size=128256, model_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336, norm_eps=1e-5
)


def compiled(topology: str, tokens: int, model: ModelConfig, execution: ExecutionConfig, ulysses: int = 1) -> jax.stages.Compiled:
    """A full fine-tuning step, float32 weights and Adam, of one row that all chips of a slice share."""
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    if LIBRARY.exists():
        os.environ["TPU_LIBRARY_PATH"] = str(LIBRARY)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(fsdp=1, context=len(devices), ulysses=ulysses), devices)
    schemes = build_schemes(model, {"default": {"name": "rope", "theta": 5e8}})
    arch, buffers = build_architecture(model, execution, schemes, tokens)
    step = train_step(arch, specs(model, schemes, tokens), OptimConfig(lr=1e-5), 100, mesh)

    def rows(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((1, tokens), dtype, sharding=named_sharding(mesh, ("batch", "sequence")))

    whole: Any = rows(jnp.int32)
    batch = Batch(whole, whole, rows(jnp.float32), whole, whole, whole, layout=row_layout(model, execution, tokens, mesh))
    return step.compile(step.abstract_state(), batch, buffers)


def main() -> None:
    """Compile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--layers", type=int, default=LLAMA.num_layers)
    parser.add_argument("--remat", default="nested")
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--untiled", action="store_true", help="whole rows through the feed-forward layer")
    chosen = parser.parse_args()
    model = ModelConfig(**{**vars(LLAMA), "num_layers": chosen.layers})
    tiles = {"mlp_tile": None} if chosen.untiled else {}
    execution = ExecutionConfig(compute_dtype="bfloat16", remat=chosen.remat, **tiles)
    found = compiled(chosen.topology, chosen.tokens, model, execution, chosen.ulysses).memory_analysis()
    print(json.dumps({name: getattr(found, name) for name in dir(found) if name.endswith("_in_bytes")}))


if __name__ == "__main__":
    main()
