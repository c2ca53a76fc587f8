"""The lcx side of the benchmark of generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_side import MODEL, THETA, Generate, prompts, serve, weights
from side import NORM_EPS

from lcx.core.trees import Tree
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.decode import generate
from lcx.model.execution import ExecutionConfig
from lcx.positions.rotary import Rope


def params() -> Tree:
    """The weights as lcx stores them."""
    w = {name: jnp.asarray(x) for name, x in weights().items()}
    L, D, N, K, H = (MODEL[name] for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim"))
    heads = {"query": (L, D, N, H), "key": (L, D, K, H), "value": (L, D, K, H), "out": (L, N, H, D)}
    norm = {"scale": jnp.ones((L, D))}
    return {
        "embed": {"embedding": w["embedding"]},
        "layers": {
            "attention": {name: {"kernel": w[name].reshape(shape)} for name, shape in heads.items()},
            "mlp": {name: {"kernel": w[name]} for name in ("up", "gate", "down")},
            "pre_attention_norm": norm,
            "pre_mlp_norm": norm,
        },
        "final_norm": {"scale": jnp.ones(D)},
        "head": {"kernel": w["head"]},
    }


def build(rows: int, length: int, new: int) -> tuple[Generate, dict[str, Any]]:
    """`lcx.model.decode.generate`, as `lcx generate` calls it."""
    config, schemes = ModelConfig(**MODEL, norm_eps=NORM_EPS), {"global": Rope(theta=THETA)}
    arch, buffers = build_architecture(config, ExecutionConfig(), schemes, length + new)
    made, asked = params(), list(prompts(rows, length))

    def run(begun: Callable[[], None]) -> list[list[int]]:
        def heard(step: int, found: Mapping[int, int]) -> None:
            if step == 0:
                begun()

        return [row.tolist() for row in generate(made, buffers, arch, asked, new, on_token=heard)]

    size = sum(np.size(x) for x in jax.tree.leaves(made))
    return run, {"parameters": size, "versions": {name: version(name) for name in ("jax", "jaxlib")}}


if __name__ == "__main__":
    serve(build)
