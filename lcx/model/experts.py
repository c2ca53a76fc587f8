"""Mixture of experts: a router sends each token through a few of a layer's feed-forward layers; no token is ever dropped.

On a mesh the experts are distributed over the devices of the `expert` axis, which also splits the rows. A device gathers the tokens
of its peers on that axis, computes the contributions of its own experts, and these are summed where the tokens came from: of n
devices with N tokens of D numbers each, every one receives (n - 1)·N·D numbers and the same again for the way back, in the forward
pass and again in the backward pass, and holds up to n·N·min(K, E/n) rows, the number needed if all tokens choose the same experts.

Legend: B batch, T tokens, N tokens in one list, D model, F feed-forward, E experts, K experts per token, R rows, each a token for
one of its experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from lcx.core import quantized
from lcx.core.mesh import fitting_spec, psum_scatter, target_platform
from lcx.core.trees import Tree
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig
from lcx.model.linear import effective_kernel, grouped_linear

Activation = Callable[[jax.Array], jax.Array]


class Routing(NamedTuple):
    """Where tokens go: `weights` float32 and `experts` int32 `[B, T, K]`, and the router's `probabilities` float32 `[B, T, E]`."""

    weights: jax.Array
    experts: jax.Array
    probabilities: jax.Array


def route(logits: jax.Array, config: ModelConfig) -> Routing:
    """The K most likely experts of each token, weighted by their probability; `logits` float32 `[B, T, E]`.

    Dividing by the sum over the chosen experts equals a softmax over those alone (Jiang et al., 2401.04088).
    """

    def choose(logits: jax.Array) -> Routing:
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, config.experts_per_token)
        if config.normalize_expert_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(weights, experts, probabilities)

    if (mesh := _mesh()) is None:
        return choose(logits)
    # Otherwise the compiler gathers the tokens of all devices for `top_k`.
    tokens: Any = fitting_spec(_TOKENS, logits.shape, mesh)  # which stands in the result's class for arrays
    return jax.shard_map(choose, mesh=mesh, in_specs=tokens, out_specs=Routing(tokens, tokens, tokens))(logits)


_TOKENS = ("batch", "sequence", None)


def _mesh() -> AbstractMesh | None:
    """The current mesh if it has several devices, otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def count_load(routing: Routing, token_mask: jax.Array) -> jax.Array:
    """How many tokens marked in `token_mask` `[B, T]` chose each expert, and its total probability: float32 `[2, E]`."""
    count = routing.probabilities.shape[-1]
    chosen = jnp.sum(routing.experts[..., None] == jnp.arange(count)[None, None, None], axis=-2, dtype=jnp.float32)
    both = jnp.stack([chosen, routing.probabilities])
    return jnp.sum(both * token_mask.astype(jnp.float32)[None, :, :, None], axis=(1, 2))


def balance_loss(expert_load: jax.Array, tokens: jax.Array) -> jax.Array:
    """E · Σ_e (share of `tokens` that chose e) · (mean probability of e), of one layer; K if the load is even (2101.03961, eq. 4).

    The shares carry no gradient.
    """
    chosen, probability = expert_load / jnp.maximum(tokens, 1.0)
    return expert_load.shape[-1] * jnp.sum(chosen * probability)


def mix(
    params: Tree,
    x: jax.Array,
    routing: Routing,
    execution: ExecutionConfig,
    activation: Activation,
    feed_forward: Callable[..., jax.Array],
) -> jax.Array:
    """The weighted sum of the outputs of each token's experts, `[B, T, D] -> [B, T, D]`, on the current mesh.

    `params` holds `up`, `down` and optionally `gate` with kernels `[E, ins, outs]`. `feed_forward(params, x)` is one expert.
    """
    names = (name for name in ("up", "gate", "down") if name in params)
    params = {name: quantized.dense(effective_kernel(params[name], 1), x.dtype) for name in names}
    matmul = execution.expert_matmul
    dense = matmul == "dense" or (matmul == "auto" and target_platform() == "cpu")

    def run(params: Tree, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        rows, weights, experts = (y.reshape(-1, y.shape[-1]) for y in (x, weights, experts))
        if dense:
            return _dense(params, rows, weights, experts, feed_forward).reshape(x.shape)
        return _ragged(params, rows, weights, experts, activation).reshape(x.shape)

    if (mesh := _mesh()) is None:
        return run(params, x, routing.weights, routing.experts)
    return _expert_parallel(mesh, run, params, x, routing)


def _expert_parallel(mesh: AbstractMesh, run: Callable[..., jax.Array], params: Tree, x: jax.Array, routing: Routing) -> jax.Array:
    """`run` on the tokens and experts of each device. Rows or tokens that the mesh cannot split are computed by all devices."""
    tokens = fitting_spec(_TOKENS, x.shape, mesh)
    axes = {name: ("experts", "mlp", None) if name == "down" else ("experts", None, "mlp") for name in params}
    kernels = {name: fitting_spec(axes[name], kernel.shape, mesh) for name, kernel in params.items()}
    experts_split, features_split, _ = (entry is not None for entry in kernels["down"])
    gathered = experts_split and tokens[0] is not None
    # Partial sums are returned along an axis of their own: summing inside would cost the backward pass another sum.
    parts = (("tensor",) if features_split else ()) + (("expert",) if experts_split and not gathered else ())

    def here(params: Tree, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        if gathered:
            x, weights, experts = (jax.lax.all_gather(y, "expert", tiled=True) for y in (x, weights, experts))
        if experts_split:
            experts = experts - jax.lax.axis_index("expert") * params["down"].shape[0]
        y = run(params, x, weights, experts)
        return (psum_scatter(y, "expert") if gathered else y)[None]

    return jnp.sum(
        jax.shard_map(
            here,
            mesh=mesh,
            in_specs=(kernels, tokens, tokens, tokens),
            out_specs=PartitionSpec(parts or None, *tokens),
            check_vma=False,
        )(params, x, routing.weights, routing.experts),
        axis=0,
    )


def _dense(params: Tree, x: jax.Array, weights: jax.Array, experts: jax.Array, feed_forward: Callable[..., jax.Array]) -> jax.Array:
    """Every expert on every token `[N, D]`, one expert after another; also the oracle for `_ragged`."""
    count = params["down"].shape[0]
    chosen = experts[:, None, :] == jnp.arange(count)[None, :, None]
    shares = jnp.sum(jnp.where(chosen, weights[:, None, :], 0.0), axis=-1)

    @jax.checkpoint
    def add(total: jax.Array, expert: tuple) -> tuple:
        kernels, share = expert
        y = feed_forward({name: {"kernel": kernel} for name, kernel in kernels.items()}, x)
        return total + share[:, None] * y.astype(jnp.float32), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x, jnp.float32), (params, shares.T))
    return total.astype(x.dtype)


class _Rows(NamedTuple):
    """Tokens assigned to experts: `sizes` `[E]` rows for each, in order. `token` `[R]` is each row's token, `choice` `[R]` which of
    its K choices. `row` `[N, K]` is the row of each pair; `here` `[N, K]` and `used` `[R]` mark pairs and rows of the local
    experts."""

    sizes: jax.Array
    token: jax.Array
    choice: jax.Array
    row: jax.Array
    here: jax.Array
    used: jax.Array


def _sort_by_expert(experts: jax.Array, count: int) -> _Rows:
    """Rows in the order of their experts 0 … count - 1; any other number in `experts` `[N, K]` is an expert on another device."""
    N, K = experts.shape
    here = (experts >= 0) & (experts < count)
    sizes = jnp.sum(experts.reshape(1, -1) == jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)
    order = jnp.argsort(jnp.where(here, experts, count).reshape(-1), stable=True)
    row = jnp.argsort(order).reshape(N, K)
    order = order[: N * min(K, count)]
    return _Rows(sizes, order // K, order % K, row, here, jnp.arange(order.shape[0]) < jnp.sum(sizes))


@jax.custom_vjp
def _dispatch(x: jax.Array, rows: _Rows) -> jax.Array:
    """Copies tokens `[N, D]` to their rows `[R, D]`; unused rows hold zeros."""
    return jnp.where(rows.used[:, None], x[rows.token], 0)


@jax.custom_vjp
def _combine(y: jax.Array, rows: _Rows) -> jax.Array:
    """The sum of each token's rows, `[R, D]` to `[N, D]`, summed in float32; the contents of unused rows do not matter."""
    # A gather for each of the K: the transpose of `_dispatch`'s gather would be a scatter, which adds up row by row.
    parts = (
        jnp.where(rows.here[:, k, None], y.at[rows.row[:, k]].get(mode="clip"), 0).astype(jnp.float32)
        for k in range(rows.row.shape[1])
    )
    return functools.reduce(jnp.add, parts).astype(y.dtype)


@jax.custom_vjp
def _gather_weights(weights: jax.Array, rows: _Rows) -> jax.Array:
    """The weights `[N, K]` of the pairs, in the order of their rows `[R]`."""
    return weights[rows.token, rows.choice]


_dispatch.defvjp(lambda x, rows: (_dispatch(x, rows), rows), lambda rows, dy: (_combine(dy, rows), None))
_combine.defvjp(lambda y, rows: (_combine(y, rows), rows), lambda rows, dx: (_dispatch(dx, rows), None))
_gather_weights.defvjp(
    lambda weights, rows: (_gather_weights(weights, rows), rows),
    lambda rows, d: (jnp.where(rows.here, d.at[rows.row].get(mode="clip"), 0.0), None),
)


def _ragged(params: Tree, x: jax.Array, weights: jax.Array, experts: jax.Array, activation: Activation) -> jax.Array:
    """Each token `[N, D]` through its own experts, sorted by expert; rows are weighted before `down`, where F is often below D."""
    rows = _sort_by_expert(experts, params["down"].shape[0])
    names = [name for name in ("up", "gate") if name in params]
    # Discards whatever the grouped product leaves in rows without a group, forward and backward.
    used = rows.used[:, None]

    # Checkpointed as in `linear.project`: the gather and the elementwise work are recomputed, but no product.
    @jax.checkpoint
    def project(x: jax.Array) -> list[jax.Array]:
        sent = _dispatch(x, rows)
        return [jnp.where(used, grouped_linear(sent, params[name], rows.sizes), 0) for name in names]

    @jax.checkpoint
    def down(weights: jax.Array, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        inner = activation(up) if gate is None else activation(gate) * up
        inner = jnp.where(used, inner.astype(jnp.float32) * _gather_weights(weights, rows)[:, None], 0.0)
        return grouped_linear(inner.astype(x.dtype), params["down"], rows.sizes)

    return _combine(down(weights, *project(x)), rows)
