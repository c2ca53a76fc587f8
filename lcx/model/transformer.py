"""The decoder: pure functions over a parameter dict, scanned over the layer pattern's period.

Legend: B batch, T tokens, N heads, K key-value heads, H head dim, D model, F feed-forward, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.attend import attend
from lcx.attention.blockwise import SAVED
from lcx.core.batch import PADDING, Batch, Index
from lcx.core.mesh import context_size, fitting_spec, target_platform
from lcx.core.trees import Tree, cast
from lcx.model import experts
from lcx.model.config import Architecture, ModelConfig
from lcx.model.linear import linear
from lcx.positions.rotary import tables

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}

CPU_UNROLL = 8
"""Periods per iteration of the scan over layers on a CPU (`ModelConfig.layer_unroll`). Not used if anything is recomputed: outside
a loop XLA's CPU backend finds the first result and keeps it after all."""

CPU_WIDE = 2**20
"""Elements of a feed-forward layer's inner activations that a CPU processes at once, 4 MiB: they stay in its cache. A step of 4,096
tokens needs a quarter less memory, and no more time although it computes two products again."""

LONG = 8192
"""Number of tokens in a row from which `remat="auto"` recomputes what is cheap to compute."""

INPUT = "layer input"
"""Name of the input to a period of layers, for rematerialisation policies."""

Norm = Callable[[jax.Array], jax.Array]

Attend = Callable[..., tuple[jax.Array, Tree]]
"""`(kind, nth, layer, state, q_BTNH, k_BTKH, v_BTKH) -> (o_BTNH, state)`: how a layer's queries attend to keys.

The layer is the `nth` of its kind (an int or int32 scalar). `state` is what `layers` carries from layer to layer: nothing in
training, the whole cache in decoding.
"""


def hidden(params: Tree, buffers: Tree, arch: Architecture, batch: Batch) -> jax.Array:
    """Final hidden states `[B, T, D]` in the compute dtype, after the last norm.

    `params` follows `model.params.specs`; `buffers` comes from `model.config.build_architecture`. Activations are constrained
    to the current mesh (`jax.set_mesh`), if any.
    """
    return _forward(params, buffers, arch, batch, None)[0]


def forward(params: Tree, buffers: Tree, arch: Architecture, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """Like `hidden`, with the mean over layers of the experts' load-balancing loss over tokens that are not padding, a float32
    scalar; None if its weight is 0."""
    real = batch.segments != PADDING if arch.config.router_aux_weight else None
    x, total = _forward(params, buffers, arch, batch, real)
    return x, None if total is None else total / arch.config.num_layers


def _forward(
    params: Tree, buffers: Tree, arch: Architecture, batch: Batch, real: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    params = cast_params(params, arch.config)
    index = batch.index
    context = {kind: KindContext.build(arch, kind, params, buffers, index) for kind in arch.config.kinds}

    def local(
        kind: str, nth: jax.Array | int, layer: Tree, state: None, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, None]:
        here = context[kind]
        out = attend(
            arch.attention(kind), q, k, v, index, index,
            q_tables=here.tables, k_tables=here.tables, bias_params=here.bias, query_scale=here.query_scale,
            sinks=layer["attention"].get("sinks"),
        )  # fmt: skip
        return out, state

    x = embed(params, buffers, arch, batch.tokens, index.positions)
    x, _, total = layers(params["layers"], x, arch.config, local, real=real)
    return rms_norm(params["final_norm"], x, arch.config), total


def cast_params(params: Tree, config: ModelConfig) -> Tree:
    """Weights in the compute dtype; cast while still sharded, so that gathering moves the smaller numbers."""
    low = cast(params, jnp.dtype(config.compute_dtype))
    # Parameters of positional biases stay float32: they are added to float32 scores.
    if "positions" in params:
        low["positions"] = params["positions"]
    # So does the router, since rounding it would send tokens to other experts (2101.03961, section 2.4).
    if config.num_experts is not None:
        trees = (low["layers"], params["layers"])
        for ours, given in zip(*trees, strict=True) if isinstance(params["layers"], tuple) else [trees]:
            ours["mlp"]["router"] = given["mlp"]["router"]
    return low


class KindContext:
    """What the layers of one kind share in a forward pass: rotary tables, bias parameters, temperatures."""

    def __init__(self, tables: Tree, bias: Tree | None, query_scale: jax.Array | None):
        self.tables, self.bias, self.query_scale = tables, bias, query_scale

    @classmethod
    def build(cls, arch: Architecture, kind: str, params: Tree, buffers: Tree, index: Index) -> "KindContext":
        """For queries and keys at `index`."""
        scheme, constants = arch.scheme(kind), buffers[kind]
        bias = {**constants.get("bias", {}), **params.get("positions", {}).get(kind, {})} if scheme.bias is not None else None
        query_scale = None
        if scheme.query_scale is not None:
            query_scale = scheme.query_scale(constants.get("query_scale", {}), index.positions)
        return cls(tables(scheme, constants, index.positions), bias, query_scale)


def embed(params: Tree, buffers: Tree, arch: Architecture, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Token embeddings `[B, T, D]` with absolute positional embeddings added once per scheme that has them."""
    config = arch.config
    x = params["embed"]["embedding"][tokens]
    if config.embedding_scale:
        x = x * jnp.asarray(config.model_dim**0.5, x.dtype)
    for kind, scheme in arch.schemes:
        if scheme.embed is not None:
            learned = params.get("positions", {}).get(kind, {})
            x = x + scheme.embed(learned, buffers[kind].get("embed", {}), positions, config.model_dim).astype(x.dtype)
            break
    return constrain(x)


def layers(
    stacked: Tree, x: jax.Array, config: ModelConfig, attend_: Attend, state: Tree = None, real: jax.Array | None = None
) -> tuple[jax.Array, Tree, jax.Array | None]:
    """Run all layers over `x` `[B, T, D]`: a scan over whole periods of the pattern, the rest unrolled.

    `state` goes through `attend_` from layer to layer, as a carry of the scan: changes to it are written in place. Layers with one
    tree each (`unstack`), for decoding, are unrolled. Also returns the sum over layers of the load-balancing loss over the tokens
    marked in `real` `[B, T]`; None without them.
    """
    if isinstance(stacked, tuple):
        kinds = config.layer_kinds
        for i, (kind, layer) in enumerate(zip(kinds, stacked, strict=True)):
            x, state, _ = block(layer, x, config, functools.partial(attend_, kind, kinds[:i].count(kind), layer, state))
        return x, state, None
    period = len(config.pattern)
    whole = config.num_layers // period
    policy = config.remat if config.remat != "auto" else "attention" if x.shape[1] >= LONG else "none"
    step = remat(functools.partial(_period, config=config, attend_=attend_, real=real), policy)
    carry, done = (x, state, None if real is None else jnp.zeros((), jnp.float32)), 0
    if whole > 1:
        done = whole * period
        grouped = jax.tree.map(lambda w: w[:done].reshape(whole, period, *w.shape[1:]), stacked)
        unroll = config.layer_unroll or (CPU_UNROLL if policy == "none" and target_platform() == "cpu" else 1)

        def turn(carry: tuple, group: tuple) -> tuple:
            return step(carry, group, kinds=config.pattern), None

        carry, _ = jax.lax.scan(turn, carry, (grouped, jnp.arange(whole, dtype=jnp.int32)), unroll=min(whole, unroll))
    for start in range(done, config.num_layers, period):
        kinds = config.pattern[: config.num_layers - start]
        rest = jax.tree.map(functools.partial(_slice, start=start, size=len(kinds)), stacked)
        carry = step(carry, (rest, start // period), kinds=kinds)
    return carry


def unstack(params: Tree) -> Tree:
    """Parameters whose layers are a tuple with one tree each: separate arrays instead of slices of `[L, ...]`.

    For programs that read every weight for a few tokens: XLA's CPU backend copies a slice before it multiplies by it, which takes
    several times longer than the product.
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(count))}


def _slice(w: jax.Array, *, start: int, size: int) -> jax.Array:
    return w[start : start + size]


def remat(step: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`step(carry, group, kinds=...)` with what it saves for the backward pass chosen by name (`ModelConfig.remat`)."""
    if policy == "none":
        return step
    policies = {
        "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": jax.checkpoint_policies.nothing_saveable,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT, SAVED],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return lambda carry, group, kinds: jax.checkpoint(functools.partial(step, kinds=kinds), policy=policies[policy])(carry, group)


def _period(
    carry: tuple, group: tuple, *, kinds: tuple[str, ...], config: ModelConfig, attend_: Attend, real: jax.Array | None
) -> tuple:
    (x, state, total), (weights, turn) = carry, group
    x = checkpoint_name(x, INPUT)
    for i, kind in enumerate(kinds):
        layer = jax.tree.map(lambda w, i=i: w[i], weights)
        nth = turn * config.pattern.count(kind) + kinds[:i].count(kind)
        x, state, balance = block(layer, x, config, functools.partial(attend_, kind, nth, layer, state), real)
        total = None if total is None else total + balance
    return x, state, total


def block(
    layer: Tree, x: jax.Array, config: ModelConfig, attend_: Callable[..., tuple], real: jax.Array | None = None
) -> tuple[jax.Array, Tree, jax.Array | None]:
    """One transformer layer: attention and feed-forward, each a residual branch with the norms of the config.

    Also returns the layer's state and load-balancing loss, as `layers` does.
    """
    state = balance = None
    for name in ("attention", "mlp"):
        norm = functools.partial(rms_norm, layer[f"pre_{name}_norm"], config=config) if config.pre_norm else None
        if name == "attention":
            y, state = attention(layer["attention"], x, config, attend_, norm)
        else:
            y, balance = mlp(layer["mlp"], x, config, norm, real)
        y = rms_norm(layer[f"post_{name}_norm"], y, config) if config.post_norm else y
        x = constrain(x + y)
    return x, state, balance


def attention(
    params: Tree, x: jax.Array, config: ModelConfig, attend_: Callable[..., tuple], norm: Norm | None = None
) -> tuple[jax.Array, Tree]:
    """Attention branch `[B, T, D] -> [B, T, D]` over `norm(x)`, and the layer's state after it."""
    q, k, v = _project([params[name] for name in ("query", "key", "value")], x, norm)
    if config.qk_norm == "head":
        q, k = rms_norm(params["query_norm"], q, config), rms_norm(params["key_norm"], k, config)
    elif config.qk_norm == "full":
        q, k = (
            rms_norm(params[name], y.reshape(*y.shape[:-2], -1), config).reshape(y.shape)
            for name, y in (("query_norm", q), ("key_norm", k))
        )
    out, state = attend_(q, k, v)
    return linear(params["out"], out, contract=2), state


def mlp(
    params: Tree, x: jax.Array, config: ModelConfig, norm: Norm | None = None, real: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Feed-forward branch `[B, T, D] -> [B, T, D]` over `norm(x)`, gated or plain, one or a mixture of experts; long rows tile by
    tile (`config.mlp_tile`). Also returns the experts' load-balancing loss over the tokens marked in `real`; None without them."""
    B, T, _ = x.shape
    count = _mlp_tiles(T, config)

    def branch(part: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        tokens, marks = part
        if config.num_experts is None:
            return _mlp(params, tokens, config, norm), None
        return _experts(params, tokens, config, norm, marks)

    if count == 1:
        y, load = branch((x, real))
    else:
        tiles = jax.tree.map(lambda a: a.reshape(B, count, T // count, *a.shape[2:]).swapaxes(0, 1), (x, real))
        y, load = jax.lax.map(jax.checkpoint(branch, prevent_cse=False), tiles)
        y, load = y.swapaxes(0, 1).reshape(x.shape), None if load is None else jnp.sum(load, axis=0)
    return y, None if load is None else experts.balance_loss(load, jnp.sum(real, dtype=jnp.float32))


def _mlp_tiles(length: int, config: ModelConfig) -> int:
    most = config.mlp_tile
    if most is not None and target_platform() == "cpu":
        most = max(1, min(most, CPU_WIDE // config.mlp_dim))
    # A row that is split over devices is already cut, and cutting it again would move it between them.
    if most is None or length <= most or context_size() > 1:
        return 1
    least = -(-length // most)
    return next((n for n in range(least, 2 * least) if length % n == 0), 1)


def _mlp(params: Tree, x: jax.Array, config: ModelConfig, norm: Norm | None) -> jax.Array:
    activation = ACTIVATIONS[config.activation]
    inner = _project([params[name] for name in (("up", "gate") if config.gated else ("up",))], x, norm)

    @jax.checkpoint
    def down(up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        return linear(params["down"], activation(up) if gate is None else activation(gate) * up)

    return down(*inner)


def _experts(
    params: Tree, x: jax.Array, config: ModelConfig, norm: Norm | None, real: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The mixture's output, and the router's load on its experts from the tokens marked in `real`."""
    y = x if norm is None else norm(x)

    @jax.checkpoint
    def router(y: jax.Array) -> experts.Routing:
        with jax.default_matmul_precision("highest"):
            return experts.route(linear(params["router"], y.astype(jnp.float32)), config)

    routing = router(y)
    out = experts.mix(params, y, routing, config, ACTIVATIONS[config.activation], lambda params, y: _mlp(params, y, config, None))
    return out, None if real is None else experts.load(routing, real)


def _project(weights: list[Tree], x: jax.Array, norm: Norm | None) -> list[jax.Array]:
    """`norm(x)` through each of several linear maps.

    Like `down` above: checkpointed, and yet no matrix product is computed twice, because the backward pass of a product needs
    only its input. The elementwise work before it is recomputed, and its result is not kept.
    """

    @jax.checkpoint
    def project(x: jax.Array) -> list[jax.Array]:
        y = x if norm is None else norm(x)
        return [linear(params, y) for params in weights]

    return project(x)


def rms_norm(params: Tree, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype (Zhang & Sennrich, 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    scale = params["scale"].astype(jnp.float32) + config.norm_offset
    return (wide * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def constrain(x: jax.Array) -> jax.Array:
    """Constrain activations `[B, T, ...]` to rows × sequence of the current mesh, where divisible; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = ("batch", "sequence", *(None,) * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, fitting_spec(axes, x.shape, mesh))


def describe(config: ModelConfig, num_parameters: int) -> dict[str, Any]:
    """A model's headline figures, for logs and reports."""
    return {
        "layers": config.num_layers,
        "model_dim": config.model_dim,
        "heads": f"{config.num_heads}/{config.num_kv_heads} x {config.head_dim}",
        "pattern": "-".join(config.pattern),
        **({} if config.num_experts is None else {"experts": f"{config.experts_per_token}/{config.num_experts}"}),
        "parameters": num_parameters,
    }
