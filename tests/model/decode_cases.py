"""Prefill and decode, chunk by chunk, against one forward pass over the same tokens.

Legend: B rows, T tokens of a row, W its width with the padding on the left, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import Batch, Index
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.core.param_spec import initialize, shardings
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture, build_architecture, build_schemes
from lcx.model.cache import empty_cache
from lcx.model.config import ModelConfig
from lcx.model.decode import extend
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.params import specs
from lcx.model.transformer import hidden_states

AUTO = ExecutionConfig()


def build(
    config: ModelConfig, positions: dict[str, Any], length: int, execution: ExecutionConfig = AUTO
) -> tuple[Tree, Tree, Architecture, Tree]:
    """(weights, arrays, architecture, parameter table); weights that make the choice of each token depend on the prompt."""
    schemes = build_schemes(config, positions)
    arch, buffers = build_architecture(config, execution, schemes, length)
    table = specs(config, schemes, length)
    params = initialize(table, jax.random.key(0))
    params["embed"]["embedding"] *= 4
    if config.sinks:
        params["layers"]["attention"]["sinks"] = jax.random.normal(jax.random.key(1), (config.num_layers, config.num_heads))
    return params, buffers, arch, table


def place(params: Tree, table: Tree, mesh: MeshConfig) -> tuple[Tree, jax.sharding.Mesh]:
    """The weights on a mesh of host devices as training places them, and the mesh."""
    made = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.expert * mesh.tensor * mesh.context])
    return jax.device_put(params, shardings(table, made)), made


def forward(params: Tree, buffers: Tree, arch: Architecture, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Logits `[T, V]` of each row, all at once as in training, on one device."""
    width = max(map(len, rows))
    tokens = np.stack([np.pad(row, (0, width + 1 - len(row))) for row in rows])
    found = np.asarray(jax.jit(_whole, static_argnames="arch")(params, buffers, arch, Batch.from_tokens(tokens)))
    return [one[: len(row)] for one, row in zip(found, rows, strict=True)]


def _whole(params: Tree, buffers: Tree, arch: Architecture, batch: Batch) -> jax.Array:
    return logits(params, hidden_states(params, buffers, arch, batch)[0], arch.config)


def by_chunks(params: Tree, buffers: Tree, arch: Architecture, rows: list[np.ndarray], chunk: int, new: int) -> list[np.ndarray]:
    """Logits `[T, V]` of each row: its last `new` tokens one at a time, what is before them by chunks, as `generate` does."""
    lengths = np.asarray([len(row) - new for row in rows])
    width = -(-int(lengths.max()) // chunk) * chunk
    offset = (width - lengths)[:, None]
    order = np.broadcast_to(np.arange(width + new), (len(rows), width + new))
    tokens = np.stack([np.pad(row, (width + new - len(row), 0)) for row in rows])
    index = Index(*(jnp.asarray(x, jnp.int32) for x in (order, np.maximum(order - offset, 0), order >= offset)))
    cache = empty_cache(arch, buffers, len(rows), width + new, chunk)
    steps = [(start, chunk) for start in range(0, width, chunk)] + [(width + i, 1) for i in range(new)]
    out = []
    for start, size in steps:
        part = jnp.asarray(tokens[:, start : start + size], jnp.int32)
        states, cache = extend(params, buffers, arch, cache, part, index.slice(start, size), start)
        out.append(np.asarray(_logits(params, states, arch)))
    found = np.concatenate(out, axis=1)
    return [one[-len(row) :] for one, row in zip(found, rows, strict=True)]


_logits = jax.jit(lambda params, states, arch: logits(params, states, arch.config), static_argnums=2)


def furthest(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest |found - wanted| over max(1, max|wanted|)."""
    return max(float(np.max(np.abs(a - b))) / max(1.0, float(np.max(np.abs(b)))) for a, b in zip(found, wanted, strict=True))
