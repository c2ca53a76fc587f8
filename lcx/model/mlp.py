"""The feed-forward branch of a layer: gated or plain, one block or a mixture of experts.

Legend: B batch, T tokens, D model, F feed-forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcx.core.batch import cut_tokens, join_tokens
from lcx.core.mesh import context_size, target_platform
from lcx.core.trees import Tree
from lcx.model import experts
from lcx.model.architecture import Architecture
from lcx.model.config import ModelConfig
from lcx.model.linear import linear, project
from lcx.model.norm import Norm, before
from lcx.model.tiles import count_tiles, over_tiles, shard_length

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}

CPU_WIDE = 2**20
"""Elements of a feed-forward layer's inner activations that a CPU processes at once, 4 MiB: they stay in its cache. A step of 4,096
tokens needs a quarter less memory, and no more time although it computes two products again."""


def mlp(
    params: Tree, x: jax.Array, arch: Architecture, norm: Tree | None = None, token_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Feed-forward branch `[B, T, D] -> [B, T, D]`, gated or plain, one or a mixture of experts; long rows tile by tile
    (`mlp_tile`). `norm` holds the parameters of the norm before it. Also returns the experts' load-balancing loss over the tokens
    marked in `token_mask`; None without them."""
    B, T, _ = x.shape
    count = mlp_tiles(T, arch)
    if arch.config.num_experts is None:
        run = functools.partial(_feed_forward_of, config=arch.config)
        return (run((params, norm), x) if count == 1 else over_tiles(run, (params, norm), (x,), count)), None

    def branch(part: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        tokens, marks = part
        return _experts(params, tokens, arch, before(norm, arch.config), marks)

    if count == 1:
        y, expert_load = branch((x, token_mask))
    else:
        y, expert_load = jax.lax.map(jax.checkpoint(branch, prevent_cse=False), cut_tokens((x, token_mask), count))
        y, expert_load = join_tokens(y), None if expert_load is None else jnp.sum(expert_load, axis=0)
    if expert_load is None or token_mask is None:
        return y, None
    return y, experts.balance_loss(expert_load, jnp.sum(token_mask, dtype=jnp.float32))


def _feed_forward_of(weights: tuple[Tree, Tree | None], x: jax.Array, *, config: ModelConfig) -> jax.Array:
    params, norm = weights
    return feed_forward(params, x, config, before(norm, config))


def mlp_tiles(length: int, arch: Architecture) -> int:
    """In how many tiles the tokens of a row of `length` go through the feed-forward layer, on each device that has a part of it."""
    most = arch.execution.mlp_tile
    if most is not None and target_platform() == "cpu":
        most = max(1, min(most, CPU_WIDE // arch.config.mlp_dim))
    # Experts exchange tokens between devices, so a part of a row is not cut again for them.
    if (arch.config.num_experts is not None and context_size() > 1) or length % context_size():
        return 1
    return count_tiles(shard_length(length), most)


def feed_forward(params: Tree, x: jax.Array, config: ModelConfig, norm: Norm | None) -> jax.Array:
    """One feed-forward block `[B, T, D] -> [B, T, D]` over `norm(x)`."""
    activation = ACTIVATIONS[config.activation]
    inner = project([params[name] for name in (("up", "gate") if config.gated else ("up",))], x, norm)

    @jax.checkpoint
    def down(up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        return linear(params["down"], activation(up) if gate is None else activation(gate) * up)

    return down(*inner)


def _experts(
    params: Tree, x: jax.Array, arch: Architecture, norm: Norm | None, token_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The mixture's output, and the router's expert_load on its experts from the tokens marked in `token_mask`."""
    config = arch.config
    y = x if norm is None else norm(x)

    @jax.checkpoint
    def router(y: jax.Array) -> experts.Routing:
        with jax.default_matmul_precision("highest"):
            return experts.route(linear(params["router"], y.astype(jnp.float32)), config)

    routing = router(y)
    activation = ACTIVATIONS[config.activation]
    out = experts.mix(params, y, routing, arch.execution, activation, lambda params, y: feed_forward(params, y, config, None))
    return out, None if token_mask is None else experts.count_load(routing, token_mask)
