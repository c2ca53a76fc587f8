"""Floating-point operations, counted by walking a jaxpr with trip counts.

XLA's own counter counts the body of a loop once; this one multiplies it by the trip count. Loops whose trip count is only known
at run time (over the blocks that a mask leaves visible) take it from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from lcx.core.mask import visible_pairs
from lcx.core.trees import Tree, paths
from lcx.model.config import ModelConfig, is_local


def count(function: Callable[..., Any], *args: Any, while_trips: int = 1) -> int:
    """Multiply-adds of matrix products in `function(*args)`, times two. Arguments may be abstract.

    A loop with a run-time trip count is assumed to run `while_trips` times; all blocks of a Pallas kernel count, even those that it
    skips.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, while_trips)


def count_jaxpr(jaxpr: jex.Jaxpr, while_trips: int = 1) -> int:
    """As `count`, of a function that is traced already."""
    return _jaxpr(jaxpr, while_trips)


def kernel_calls(jaxpr: jex.Jaxpr) -> int:
    """Of the operations that `count_jaxpr` finds, those of Pallas kernels."""
    return _jaxpr(jaxpr, 1, only="pallas_call")


def _jaxpr(jaxpr: jex.Jaxpr, while_trips: int, only: str | None = None) -> int:
    """The sum over a jaxpr's equations; `only` those of primitives of this name, whole, and nothing outside of them."""
    return sum(_equation(equation, while_trips, only) for equation in jaxpr.eqns)


def _equation(equation: jex.JaxprEqn, while_trips: int, only: str | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == only:
        only = None
    if name in ("dot_general", "ragged_dot_general"):
        return 0 if only else _dot(equation) if name == "dot_general" else _ragged_dot(equation)
    if name == "scan":
        return params["length"] * _jaxpr(params["jaxpr"].jaxpr, while_trips, only)
    if name == "while":
        return while_trips * _jaxpr(params["body_jaxpr"].jaxpr, while_trips, only)
    if name == "cond":
        return max(_jaxpr(branch.jaxpr, while_trips, only) for branch in params["branches"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _jaxpr(params["jaxpr"], while_trips, only)
    if name == "shard_map":
        return _pieces(params) * _jaxpr(params["jaxpr"], while_trips, only)
    total = 0
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if isinstance(inner, jex.Jaxpr):
            total += _jaxpr(inner, while_trips, only)
    return total


def _pieces(params: Mapping[str, Any]) -> int:
    """How many devices a `shard_map` splits its arguments over; of axes that are not manual, the body's shapes are whole."""
    sizes = params["mesh"].shape
    # The name differs between versions of JAX.
    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    if manual is None:
        manual = set(sizes) - set(params.get("auto", ()))
    return math.prod(sizes[axis] for axis in manual)


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _dot(equation: jex.JaxprEqn) -> int:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    out = _shape(equation.outvars[0])
    return 2 * int(np.prod(out, dtype=np.int64)) * math.prod(left[i] for i in contract)


def _ragged_dot(equation: jex.JaxprEqn) -> int:
    """Every row is multiplied by one group, whether groups are separate rows of the result or are summed over."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    left, groups = _shape(equation.invars[0]), _shape(equation.invars[2])[-1]
    out = int(np.prod(_shape(equation.outvars[0]), dtype=np.int64))
    if set(numbers.lhs_ragged_dimensions) & set(contract):
        out //= groups
    return 2 * out * math.prod(left[i] for i in contract)


def forward_flops(config: ModelConfig, rows: int, length: int) -> int:
    """Operations of one forward pass over `rows` × `length` tokens, matrix products only; of the experts, only the chosen ones.

    Attention is counted for the pairs that a causal mask (and a local layer's window) leaves visible, exactly.
    """
    N, K, H, D, F = config.num_heads, config.num_kv_heads, config.head_dim, config.model_dim, config.mlp_dim
    projections = D * H * (2 * N + 2 * K)
    feed_forward = D * F * (3 if config.gated else 2)
    if config.num_experts is not None:
        feed_forward = config.experts_per_token * feed_forward + D * config.num_experts
    per_token = config.num_layers * (projections + feed_forward) + D * config.vocab_size
    pairs = sum(visible_pairs(length, config.window if is_local(kind) else None) for kind in config.layer_kinds)
    return 2 * rows * (length * per_token + pairs * 2 * N * H)


def step_flops(config: ModelConfig, rows: int, length: int, frozen: int = 0, added: int = 0) -> int:
    """Operations of a training step: the forward pass and twice that for the backward; recomputation is not counted (MFU).

    Of `frozen` entries of kernels the gradient is not computed, which saves a third of their products; `added` entries of adapters'
    kernels have all three. See `kernel_entries`.
    """
    return 3 * forward_flops(config, rows, length) + 2 * rows * length * (3 * added - frozen)


def kernel_entries(config: ModelConfig, table: Tree, chosen: Callable[[str], bool]) -> int:
    """Entries that a token is multiplied with, in those kernels of a table of parameters that are `chosen` by their paths.

    Of the experts' those of the chosen ones count.
    """
    total = 0
    for path, spec in paths(table):
        is_output = path == "embed/embedding" and config.tied_embeddings
        if (spec.inputs or is_output) and chosen(path):
            share = (config.experts_per_token, config.num_experts) if "experts" in spec.logical_axes else (1, 1)
            total += math.prod(spec.shape) * share[0] // (share[1] or 1)
    return total
