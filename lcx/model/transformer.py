"""The decoder: pure functions over a parameter dict, scanned over the layer pattern's period.

Legend: B batch, T tokens, N heads, K key-value heads, H head dim, D model, F feed-forward, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.attend import attend
from lcx.attention.blockwise import SAVED
from lcx.attention.parallel.nested import parts_of
from lcx.core.batch import PADDING, SHARED, Batch, Index
from lcx.core.mesh import context_size, fitting_spec, target_platform
from lcx.core.quantized import is_quantized
from lcx.core.trees import Tree, cast
from lcx.model.architecture import Architecture
from lcx.model.config import ModelConfig, is_local
from lcx.model.execution import ExecutionConfig
from lcx.model.linear import linear, project
from lcx.model.mlp import feed_forward, mlp, mlp_tiles
from lcx.model.norm import before, rms_norm
from lcx.model.tiles import over_tiles
from lcx.positions.rotary import tables

CPU_UNROLL = 8
"""Periods per iteration of the scan over layers on a CPU (`ExecutionConfig.layer_unroll`). Not used if anything is recomputed:
outside a loop XLA's CPU backend finds the first result and keeps it after all."""

LONG = 8192
"""Number of tokens in a row from which `remat="auto"` recomputes what is cheap to compute."""

INPUT = "layer input"
"""Name of the input to a period of layers, for rematerialisation policies."""

FIRST_INPUT = "input of layers recomputed together"
"""Name of what `nested` policies keep of several periods."""

AttentionFn = Callable[..., tuple[jax.Array, Tree]]
"""`(kind, nth, layer, state, q_BTNH, k_BTKH, v_BTKH) -> (o_BTNH, state)`: how a layer's queries attend to keys.

The layer is the `nth` of its kind (an int or int32 scalar). `state` is what `scan_layers` carries from layer to layer: nothing in
training, the whole cache in decoding.
"""


def hidden_states(params: Tree, buffers: Tree, arch: Architecture, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """Final hidden states `[B, T, D]` in the compute dtype, after the last norm, and the experts' load-balancing loss.

    The latter is a float32 scalar, the mean over layers for the tokens that are not padding; None if its weight is 0. `params`
    follows `model.params.specs`; `buffers` comes from `model.architecture.build_architecture`. Activations are constrained to the
    current mesh (`jax.set_mesh`), if any.
    """
    params = cast_params(params, arch)
    index = batch.index
    if index.reach is not None:
        parts = parts_of(index.reach, jax.sharding.get_abstract_mesh().shape["ring"])
        index = dataclasses.replace(index, parts=parts)
    inputs = {kind: LayerInputs.build(arch, kind, params, buffers, index) for kind in arch.config.kinds}

    def attention_fn(
        kind: str, nth: jax.Array | int, layer: Tree, state: None, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, None]:
        here, sinks = inputs[kind], layer["attention"].get("sinks")
        run = functools.partial(
            attend, arch.attention(kind), q_tables=here.tables, k_tables=here.tables, bias_params=here.bias,
            query_scale=here.query_scale,
        )  # fmt: skip
        if arch.shifted_group is None or is_local(kind):
            return run(q, k, v, index, index, sinks=sinks), state
        return shifted_attention(run, arch.shifted_group, q, k, v, index, sinks), state

    token_mask = batch.segments != PADDING if arch.config.router_aux_weight else None
    x = embed(params, buffers, arch, batch.tokens, index.positions)
    x, _, total = scan_layers(params["layers"], x, arch, attention_fn, token_mask=token_mask)
    return rms_norm(params["final_norm"], x, arch.config), None if total is None else total / arch.config.num_layers


def shifted_attention(
    run: Callable[..., jax.Array], group: int, q: jax.Array, k: jax.Array, v: jax.Array, index: Index, sinks: jax.Array | None
) -> jax.Array:
    """LongLoRA's attention within groups of `group` tokens, shifted by half a group in half of the heads (2309.12307, section 3.2).

    `run(q_BTNH, k_BTKH, v_BTKH, q_index, k_index, sinks=...)` attends. Groups are segments of their own, numbered by
    `Index.order`: where the paper rolls a row, so that its head shares a group with its tail and would see it, the row here begins
    and ends with half a group. An odd number of KV heads is split unevenly, a single one is shared by both halves.
    """
    N, K, T = q.shape[2], k.shape[2], q.shape[1]
    kv = K // 2
    heads = kv * (N // K) or N // 2
    numbers = T // group + 2

    def half(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, shift: int) -> jax.Array:
        own = index.segments * numbers + (index.order + shift) // group
        kept = (index.segments == PADDING) | (index.segments == SHARED)
        segments = jnp.where(kept, index.segments, own)
        cut = dataclasses.replace(index, segments=segments)
        return run(q, k, v, cut, cut, sinks=sinks)

    keys, values = ((x[:, :, :kv], x[:, :, kv:]) if kv else (x, x) for x in (k, v))
    queries = q[:, :, :heads], q[:, :, heads:]
    logits = (None, None) if sinks is None else (sinks[:heads], sinks[heads:])
    halves = zip(queries, keys, values, logits, (0, group // 2), strict=True)
    return jnp.concatenate([half(*one) for one in halves], axis=2)


def cast_params(params: Tree, arch: Architecture) -> Tree:
    """Weights in the compute dtype; cast while still sharded, so that gathering moves the smaller numbers."""
    # Weights of a narrower type, as a frozen base may have, are widened where they are used, a layer at a time.
    dtype = jnp.dtype(arch.execution.compute_dtype)
    low = jax.tree.map(
        lambda x: x if is_quantized(x) or x.dtype.itemsize < dtype.itemsize else cast(x, dtype), params, is_leaf=is_quantized
    )
    # Parameters of positional biases stay float32: they are added to float32 scores.
    if "positions" in params:
        low["positions"] = params["positions"]
    # So does the router, since rounding it would send tokens to other experts (2101.03961, section 2.4).
    if arch.config.num_experts is not None:
        trees = (low["layers"], params["layers"])
        for ours, given in zip(*trees, strict=True) if isinstance(params["layers"], tuple) else [trees]:
            ours["mlp"]["router"] = given["mlp"]["router"]
    return low


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What the layers of one kind share in a forward pass: rotary tables, bias parameters, query scales `[B, T]`."""

    tables: Tree
    bias: Tree | None
    query_scale: jax.Array | None

    @classmethod
    def build(cls, arch: Architecture, kind: str, params: Tree, buffers: Tree, index: Index) -> "LayerInputs":
        """For queries and keys at `index`."""
        scheme, constants = arch.scheme(kind), buffers[kind]
        bias = {**constants.get("bias", {}), **params.get("positions", {}).get(kind, {})} if scheme.bias is not None else None
        query_scale = None
        if scheme.query_scale is not None:
            # A row whose positions skip has fewer keys than they say, and one whose positions begin anew has hidden ones.
            keys = jnp.minimum(index.order, index.positions)
            query_scale = scheme.query_scale(constants.get("query_scale", {}), keys)
        return cls(tables(scheme, constants, index.positions), bias, query_scale)


def embed(params: Tree, buffers: Tree, arch: Architecture, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Token embeddings `[B, T, D]` with absolute positional embeddings, of which `build_architecture` allows one scheme."""
    config = arch.config
    dtype, table = jnp.dtype(arch.execution.compute_dtype), params["embed"]
    x = table["embedding"][tokens].astype(dtype)
    if (lora := table.get("lora")) is not None:
        x = x + lora["scale"].astype(dtype) * (lora["a"][tokens] @ lora["b"])
    if config.embedding_scale:
        x = x * jnp.asarray(config.model_dim**0.5, x.dtype)
    for kind, scheme in arch.schemes:
        if scheme.embed is not None:
            learned = params.get("positions", {}).get(kind, {})
            x = x + scheme.embed(learned, buffers[kind].get("embed", {}), positions, config.model_dim).astype(x.dtype)
            break
    return constrain(x)


def scan_layers(
    stacked: Tree,
    x: jax.Array,
    arch: Architecture,
    attention_fn: AttentionFn,
    state: Tree = None,
    token_mask: jax.Array | None = None,
) -> tuple[jax.Array, Tree, jax.Array | None]:
    """Run all layers over `x` `[B, T, D]`: a scan over whole periods of the pattern, the rest unrolled.

    `stacked` holds the weights of all layers, `[L, ...]`. `state` goes through `attention_fn` from layer to layer, a carry of the
    scan: changes to it are written in place. Also returns the sum over layers of the load-balancing loss over the tokens
    marked in `token_mask` `[B, T]`; None without them.
    """
    config, execution = arch.config, arch.execution
    period = len(config.pattern)
    whole = config.num_layers // period
    policy = remat_policy(execution, x.shape[1])
    step = remat(functools.partial(_period, arch=arch, attention_fn=attention_fn, token_mask=token_mask), policy)
    carry, done = (x, state, None if token_mask is None else jnp.zeros((), jnp.float32)), 0
    if whole > 1:
        every = execution.periods_together(whole)
        done = whole // every * every * period
        grouped = jax.tree.map(lambda w: w[:done], stacked)
        if period > 1:
            grouped = jax.tree.map(lambda w: w.reshape(-1, period, *w.shape[1:]), grouped)
        unroll = execution.layer_unroll or (CPU_UNROLL if policy == "none" and target_platform() == "cpu" else 1)
        turns = (grouped, jnp.arange(done // period, dtype=jnp.int32))
        run = functools.partial(jax.lax.scan, functools.partial(step, kinds=config.pattern), unroll=min(whole, unroll))
        if every > 1:
            turns = jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:]), turns)
            run = functools.partial(jax.lax.scan, _recomputed_together(run, policy))
        carry, _ = run(carry, turns)
    for start in range(done, config.num_layers, period):
        kinds = config.pattern[: config.num_layers - start]
        rest = jax.tree.map(operator.itemgetter(start if period == 1 else slice(start, start + len(kinds))), stacked)
        carry, _ = step(carry, (rest, start // period), kinds=kinds)
    return carry


def _recomputed_together(run: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`run(carry, turns)` over some periods, of which the first one's input is kept for the backward pass."""

    def from_first(carry: tuple, turns: Any) -> tuple:
        return run((checkpoint_name(carry[0], FIRST_INPUT), *carry[1:]), turns)

    return jax.checkpoint(from_first, policy=_keeping([FIRST_INPUT], host=policy == "nested_offload"))


def unrolled_layers(
    layers: tuple[Tree, ...], x: jax.Array, arch: Architecture, attention_fn: AttentionFn, state: Tree
) -> tuple[jax.Array, Tree]:
    """As `scan_layers`, for layers with one tree each (`unstack`), one after another; for decoding, without the balance."""
    kinds = arch.config.layer_kinds
    for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        x, state, _ = block(layer, x, arch, functools.partial(attention_fn, kind, kinds[:i].count(kind), layer, state))
    return x, state


def unstack(params: Tree) -> Tree:
    """Parameters whose layers are a tuple with one tree each: separate arrays instead of slices of `[L, ...]`.

    For programs that read every weight for a few tokens: XLA's CPU backend copies a slice before it multiplies by it, which takes
    several times longer than the product.
    """
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(count))}


def remat_policy(execution: ExecutionConfig, length: int) -> str:
    """What layers keep of rows of `length` tokens: `execution.remat`, with `auto` decided."""
    return execution.remat if execution.remat != "auto" else "attention" if length >= LONG else "none"


def remat(step: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`step(carry, group, kinds=...)` with what it saves for the backward pass chosen by name (`ExecutionConfig.remat`)."""
    if policy == "none":
        return step
    policies = {
        "attention": _keeping([SAVED]),
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": jax.checkpoint_policies.nothing_saveable,
        "offload": _keeping([INPUT, SAVED], host=True),
        "nested": _keeping([SAVED]),
        "nested_offload": _keeping([INPUT, SAVED], host=True),
    }
    return lambda carry, group, kinds: jax.checkpoint(functools.partial(step, kinds=kinds), policy=policies[policy])(carry, group)


def _keeping(names: list[str], host: bool = False) -> Any:
    """The policy that keeps what has one of these names, and arguments; on the host with `host`, on the device otherwise."""
    if not host:
        return jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device", offload_dst="pinned_host"
    )


def _period(
    carry: tuple,
    group: tuple,
    *,
    kinds: tuple[str, ...],
    arch: Architecture,
    attention_fn: AttentionFn,
    token_mask: jax.Array | None,
) -> tuple[tuple, None]:
    """One turn of the scan, with the weights of its layers stacked; those of a pattern of one kind are not.

    Of stacks that are reshaped into turns of one layer XLA makes copies, on a CPU all of them at once.
    """
    (x, state, total), (weights, turn) = carry, group
    x = checkpoint_name(x, INPUT)
    for i, kind in enumerate(kinds):
        layer = weights if len(arch.config.pattern) == 1 else jax.tree.map(operator.itemgetter(i), weights)
        nth = turn * arch.config.pattern.count(kind) + kinds[:i].count(kind)
        x, state, balance = block(layer, x, arch, functools.partial(attention_fn, kind, nth, layer, state), token_mask)
        total = None if total is None else total + balance
    return (x, state, total), None


def block(
    layer: Tree, x: jax.Array, arch: Architecture, attention_fn: Callable[..., tuple], token_mask: jax.Array | None = None
) -> tuple[jax.Array, Tree, jax.Array | None]:
    """One transformer layer: attention and feed-forward, each a residual branch with the norms of the config.

    Also returns the layer's state and load-balancing loss, as `scan_layers` does.
    """
    config, tiles = arch.config, shard_tiles(arch, x.shape[1])
    with jax.named_scope("attention"):
        project = functools.partial(queries_keys_values, config=config)
        q, k, v = over_tiles(project, _some(layer, BEFORE), (x,), tiles) if tiles > 1 else project(layer, x)
        out, state = attention_fn(q, k, v)
    if tiles > 1:
        with jax.named_scope("mlp"):
            finish = functools.partial(_rest_of_block, config=config)
            return constrain(over_tiles(finish, _some(layer, AFTER), (x, out), tiles)), state, None
    with jax.named_scope("attention"):
        x = constrain(x + _attention_output(layer, out, config))
    with jax.named_scope("mlp"):
        y, balance = mlp(layer["mlp"], x, arch, layer["pre_mlp_norm"] if config.pre_norm else None, token_mask)
        y = rms_norm(layer["post_mlp_norm"], y, config) if config.post_norm else y
        return constrain(x + y), state, balance


BEFORE = ("pre_attention_norm", "attention/query", "attention/key", "attention/value", "attention/query_norm", "attention/key_norm")
"""Parameters of a layer that are applied before its queries attend."""

AFTER = ("attention/out", "post_attention_norm", "pre_mlp_norm", "mlp", "post_mlp_norm")
"""Those that are applied afterwards."""


def _some(layer: Tree, names: tuple[str, ...]) -> Tree:
    found: Tree = {}
    for first, _, second in (name.partition("/") for name in names):
        if not second and first in layer:
            found[first] = layer[first]
        elif second in layer.get(first, {}):
            found.setdefault(first, {})[second] = layer[first][second]
    return found


def shard_tiles(arch: Architecture, length: int) -> int:
    """In how many tiles a device of a split row of `length` tokens computes a layer apart from attention; 1: not in tiles.

    Only where `remat` recomputes this anyway, and not for experts, which exchange tokens between devices.
    """
    recomputes = remat_policy(arch.execution, length) not in ("none", "dots")
    return mlp_tiles(length, arch) if context_size() > 1 and recomputes and arch.config.num_experts is None else 1


def queries_keys_values(layer: Tree, x: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, T, N, H]` and twice `[B, T, K, H]` of a layer's input, not rotated."""
    params = layer["attention"]
    norm = before(layer["pre_attention_norm"] if config.pre_norm else None, config)
    q, k, v = project([params[name] for name in ("query", "key", "value")], x, norm)
    if config.qk_norm == "head":
        q, k = rms_norm(params["query_norm"], q, config), rms_norm(params["key_norm"], k, config)
    elif config.qk_norm == "full":
        q, k = (
            rms_norm(params[name], y.reshape(*y.shape[:-2], -1), config).reshape(y.shape)
            for name, y in (("query_norm", q), ("key_norm", k))
        )
    return q, k, v


def _attention_output(layer: Tree, out: jax.Array, config: ModelConfig) -> jax.Array:
    y = linear(layer["attention"]["out"], out, inputs=2)
    return rms_norm(layer["post_attention_norm"], y, config) if config.post_norm else y


def _rest_of_block(layer: Tree, x: jax.Array, out: jax.Array, config: ModelConfig) -> jax.Array:
    """What follows attention, on a tile of tokens."""
    x = x + _attention_output(layer, out, config)
    y = feed_forward(layer["mlp"], x, config, before(layer["pre_mlp_norm"] if config.pre_norm else None, config))
    return x + (rms_norm(layer["post_mlp_norm"], y, config) if config.post_norm else y)


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
