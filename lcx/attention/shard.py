"""Attention between the queries and keys that a device holds: rotation, regions and kernel, forward and backward.

Strategies move `KVShard` between devices and call these two functions on what has arrived. The backward pass takes o and lse over
*all* keys, so that the gradients of a part are right wherever the rest of the keys was.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from lcx.attention.blockwise import blockwise, blockwise_vjp
from lcx.attention.dense import dense
from lcx.attention.flat import flat
from lcx.attention.pallas.flash import flash, flash_vjp
from lcx.attention.partial import AttentionVjp, Partial, merge, with_barrier
from lcx.attention.tiles import Blocks
from lcx.core.batch import Index
from lcx.core.mask import Mask
from lcx.positions.rotary import Tables, rotate
from lcx.positions.scheme import Region, SchemeSpec

Kernel = Literal["dense", "flat", "blockwise", "flash"]


@flax.struct.dataclass
class QueryShard:
    """Unrotated queries `[B, T, N, H]`, their index, and the rotary tables of their positions."""

    q: jax.Array
    index: Index
    tables: Tables


@flax.struct.dataclass
class KVShard:
    """Unrotated keys and values `[B, S, K, H]`, their index, and the rotary tables of their positions: what devices send around."""

    k: jax.Array
    v: jax.Array
    index: Index
    tables: Tables


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """The static arguments of attention on one device: `blocks` is None for the dense and the flat kernel.

    `platform` selects the flash kernel; `interpret` interprets it without such a device, for tests.
    """

    mask: Mask
    scheme: SchemeSpec
    scale: float
    softcap: float | None
    blocks: Blocks | None
    tile_dtype: Any
    kernel: Kernel
    platform: str
    interpret: bool

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of every kernel that supports any bias."""
        return {"bias": self.scheme.bias, "scale": self.scale, "softcap": self.softcap}

    @property
    def flash_options(self) -> dict[str, Any]:
        """The arguments of the flash kernel except slopes."""
        where = {"platform": self.platform, "interpret": self.interpret}
        return {"scale": self.scale, "softcap": self.softcap, "blocks": self.blocks, **where}


def shard_attention(shard: ShardSpec, queries: QueryShard, keys: KVShard, bias_params: Any, out_dtype: Any) -> Partial:
    """`(o_BTNH, lse_BTN)` of the queries over these keys, all regions merged; differentiable by JAX."""
    parts = [
        _kernel(shard, out_dtype)(
            _turned(queries.q, region.q_rotation, queries.tables, shard.scheme),
            _turned(keys.k, region.k_rotation, keys.tables, shard.scheme),
            keys.v, queries.index, keys.index, _mask(shard, region), bias_params=bias_params,
        )
        for region in shard.scheme.regions
    ]  # fmt: skip
    return functools.reduce(merge, parts)


class ShardVjp(NamedTuple):
    """The gradients of a device's queries through any keys: like `AttentionVjp`, but for `KVShard` and with all regions merged.

    `step(keys, in_flight)` returns `((dq, dk, dv, dbias_params), in_flight)`.
    """

    init: tuple[jax.Array, ...]
    step: Callable[[KVShard, Any], tuple[tuple[Any, ...], Any]]
    finalize: Callable[[tuple[jax.Array, ...]], jax.Array]


def shard_vjp(
    shard: ShardSpec, queries: QueryShard, kv_heads: int, bias_params: Any, whole: Partial, cotangent: Partial
) -> ShardVjp:
    """The pull-back to any keys.

    `whole` is (o, lse) of the queries over all their keys, wherever those are, and `cotangent` its cotangent. Work on the queries
    is done once, before and after, however many keys pass by.
    """
    ready = []
    for region in shard.scheme.regions:
        q, turn_back = jax.vjp(
            lambda x, region=region: _turned(x, region.q_rotation, queries.tables, shard.scheme), _to_fp32(queries.q)
        )
        q, mask = q.astype(queries.q.dtype), _mask(shard, region)
        ready.append((region, turn_back, _kernel_vjp(shard, q, queries.index, mask, kv_heads, bias_params, whole, cotangent)))

    def step(keys: KVShard, in_flight: Any) -> tuple[tuple[Any, ...], Any]:
        dq, total = [], None
        for region, _, pull in ready:
            k, turn_back = jax.vjp(
                lambda x, region=region: _turned(x, region.k_rotation, keys.tables, shard.scheme), _to_fp32(keys.k)
            )
            last = region is shard.scheme.regions[-1]
            (dq_part, dk, dv, dbias), moved = pull.step(k.astype(keys.k.dtype), keys.v, keys.index, in_flight if last else ())
            dq.append(dq_part)
            part = (*turn_back(dk), dv, dbias)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return (tuple(dq), *total), moved

    def finalize(dq: tuple[jax.Array, ...]) -> jax.Array:
        return sum(turn_back(pull.finalize(x))[0] for x, (_, turn_back, pull) in zip(dq, ready, strict=True))

    return ShardVjp(tuple(pull.init for *_, pull in ready), step, finalize)


def nothing_seen(queries: QueryShard) -> Partial:
    """The result of queries that have not seen any key yet: the start for merging partial results."""
    wide = jnp.promote_types(queries.q.dtype, jnp.float32)
    return jnp.zeros(queries.q.shape, wide), jnp.full(queries.q.shape[:3], -jnp.inf, wide)


def zeros_fp32(tree: Any) -> Any:
    """Zeros of the tree's shapes in float32 or wider: for summing gradients."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)


def cotangents(queries: QueryShard, keys: KVShard, bias_params: Any, dq: jax.Array, dkv: Any, dbias: Any) -> tuple:
    """What a strategy's VJP returns for `(queries, keys, bias_params)`, in their dtypes; indices and tables have no gradient."""
    nothing = functools.partial(jax.tree.map, jnp.zeros_like)
    dk, dv = (x.astype(like.dtype) for x, like in zip(dkv, (keys.k, keys.v), strict=True))
    return (
        QueryShard(dq.astype(queries.q.dtype), None, nothing(queries.tables)),
        KVShard(dk, dv, None, nothing(keys.tables)),
        jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias_params),
    )


def scan_key_slices(part: Callable, state: Any, keys: KVShard, slices: int) -> tuple[Any, Any]:
    """`part(state, keys) -> (state, out)` over `slices` parts of the keys in turn; each `out` `[B, S / slices, ...]` is joined."""
    if slices == 1:
        return part(state, keys)

    def one(state: Any, i: jax.Array) -> tuple[Any, Any]:
        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * (x.shape[1] // slices), x.shape[1] // slices, axis=1)

        return part(state, jax.tree.map(cut, keys))

    state, out = jax.lax.scan(one, state, jnp.arange(slices))
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), out)


def map_head_groups(
    part: Callable, groups: int, out: tuple[jax.Array, ...], arrays: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """`part(*arrays)` for `groups` groups of the heads in turn, written into `out`; heads are axis 2 of both."""

    def cut(i: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * (x.shape[2] // groups), x.shape[2] // groups, axis=2)

    def one(i: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found = part(*(cut(i, x) for x in arrays))
        return tuple(jax.lax.dynamic_update_slice_in_dim(whole, x, i * x.shape[2], 2) for whole, x in zip(out, found, strict=True))

    return jax.lax.fori_loop(0, groups, one, out)


def _kernel(shard: ShardSpec, out_dtype: Any) -> Callable[..., Partial]:
    if shard.kernel in ("dense", "flat"):
        return functools.partial(dense if shard.kernel == "dense" else flat, out_dtype=out_dtype, **shard.options)
    if shard.kernel == "flash":
        return functools.partial(_flash, shard, out_dtype=out_dtype)
    return functools.partial(blockwise, blocks=shard.blocks, tile_dtype=shard.tile_dtype, out_dtype=out_dtype, **shard.options)


def _kernel_vjp(
    shard: ShardSpec, q: jax.Array, q_index: Index, mask: Mask, kv_heads: int, bias_params: Any, whole: Partial, cotangent: Partial
) -> AttentionVjp:
    given = {"whole": whole, "cotangent": cotangent}
    if shard.kernel == "flash":
        return _flash_vjp(shard, q, q_index, mask, kv_heads, bias_params, **given)
    given["bias_params"] = bias_params
    if shard.kernel == "blockwise":
        given |= {"blocks": shard.blocks, "tile_dtype": shard.tile_dtype, **shard.options}
        return blockwise_vjp(q, q_index, mask, kv_heads, **given)

    def step(k: jax.Array, v: jax.Array, k_index: Index, in_flight: Any) -> tuple[tuple[Any, ...], Any]:
        return with_barrier(_dense_backward(shard, q, k, v, q_index, k_index, mask, **given), in_flight)

    return AttentionVjp(zeros_fp32(q), step, lambda dq: dq)


def _flash(shard: ShardSpec, *args, bias_params, **options) -> Partial:
    slopes = None if shard.scheme.bias is None else shard.scheme.bias.slopes(bias_params)
    return flash(*args, slopes=slopes, **shard.flash_options, **options)


def _flash_vjp(shard: ShardSpec, *args, **options) -> AttentionVjp:
    *args, bias_params = args
    slopes, to_bias = None, lambda _: (zeros_fp32(bias_params),)
    if shard.scheme.bias is not None:
        slopes, to_bias = jax.vjp(shard.scheme.bias.slopes, bias_params)
    pull = flash_vjp(*args, slopes=slopes, **shard.flash_options, **options)

    def step(*args) -> tuple[tuple[Any, ...], Any]:
        (*gradients, dslopes), in_flight = pull.step(*args)
        return (*gradients, *to_bias(dslopes)), in_flight

    return pull._replace(step=step)


def _dense_backward(shard: ShardSpec, q, k, v, q_index, k_index, mask, *, bias_params, whole, cotangent):
    """Uses JAX's own derivative of the part; `merge` relates it to the whole."""
    (o, lse), (do, dlse) = whole, cotangent

    def run(q, k, v, bias_params):
        return dense(q, k, v, q_index, k_index, mask, bias_params=bias_params, out_dtype=o.dtype, **shard.options)

    (o_part, lse_part), pull = jax.vjp(run, _to_fp32(q), _to_fp32(k), _to_fp32(v), bias_params)
    seen = ~(jnp.isneginf(lse_part) | jnp.isneginf(lse))
    share = jnp.where(seen, jnp.exp(jnp.where(seen, lse_part - lse, 0.0)), 0.0)
    slope = jnp.sum(do * (o_part - o), axis=-1) + dlse
    return pull((do * share[..., None], jnp.where(seen, share * slope, 0.0)))


def _mask(shard: ShardSpec, region: Region) -> Mask:
    return dataclasses.replace(shard.mask, band=region.band)


def _turned(x: jax.Array, rotation: str | None, tables: Tables, scheme: SchemeSpec) -> jax.Array:
    return x if rotation is None else rotate(x, *tables[rotation], scheme.layout)


def _to_fp32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
