"""Attention in tiles with an online softmax, in pure JAX: linear memory, its own VJP, and no work on blocks that the mask hides.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim. Inside a group (see `tiles`) a tile of
logits is `[rows, heads, G·block_q, block_k]`: the G query heads of a KV head are stacked along the rows, so keys are never
repeated. Every matrix product has both operands in row-major order (keys and values are transposed once, outside the loops),
since XLA's CPU backend is several times slower on the transposed forms.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.dense import MASKED
from lcx.attention.partial import AttentionVjp, Partial, with_barrier
from lcx.attention.spec import KernelSpec
from lcx.attention.tiles import block_bounds, fold, fold_index, row_terms, unfold, visits
from lcx.core.batch import Index
from lcx.core.mask import Bounds, visible

ONES = 16
"""Columns of ones that sum probabilities: as many as a unit of AMX multiplies at once."""

SAVED = "attention"
"""Name of o and lse for rematerialisation policies: if they are saved, the forward pass over the tiles is not run again."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise(
    spec: KernelSpec,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    bias_params: Any = None,
) -> Partial:
    """The same function as `dense`, without ever holding a T×S array; T and S need not be multiples of the blocks.

    Sums are float32 or wider whatever `spec.tile_dtype` is. `spec.blocks.rows` must divide B and `.heads` must divide K; with a
    bias, which is computed for all heads at once, `.heads` must be K. Follows FlashAttention-2 (arXiv 2307.08691): the backward
    pass recomputes tiles from q, k, v and the saved o and lse.
    """
    return _forward(spec.with_dtypes(q_BTNH.dtype), q_BTNH, k_BSKH, v_BSKH, q_index, k_index, bias_params)


def blockwise_vjp(
    spec: KernelSpec, q_BTNH: jax.Array, q_index: Index, kv_heads: int, bias_params: Any, whole: Partial, cotangent: Partial
) -> AttentionVjp:
    """The pull-back to any keys, with `dbias_params` after dv.

    `whole` is (o, lse) of the queries over all their keys, of which the given keys may be a part; `cotangent` is its cotangent. The
    queries' side is cut into tiles here, once, however many keys pass by.
    """
    spec = spec.with_dtypes(q_BTNH.dtype)
    queries = _query_residuals(spec, q_BTNH, q_index, kv_heads, whole, cotangent)

    def step(k: jax.Array, v: jax.Array, k_index: Index, in_flight: Any) -> tuple[tuple[Any, ...], Any]:
        return with_barrier(_backward(spec, queries, bias_params, k, v, k_index), in_flight)

    finalize = functools.partial(unfold, block=spec.tiles.q, blocks=spec.tiles, shape=q_BTNH.shape)
    return AttentionVjp(jnp.zeros(queries.q.shape, spec.wide), step, finalize)


def _blockwise_fwd(spec, q, k, v, q_index, k_index, bias_params):
    whole = _forward(spec.with_dtypes(q.dtype), q, k, v, q_index, k_index, bias_params)
    o, lse = (checkpoint_name(x, SAVED) for x in whole)
    return (o, lse), (q, k, v, q_index, k_index, bias_params, o, lse)


def _blockwise_bwd(spec, residuals, cotangents):
    q, k, v, q_index, k_index, bias_params, o, lse = residuals
    pull = blockwise_vjp(spec, q, q_index, k.shape[2], bias_params, (o, lse), cotangents)
    (dq, dk, dv, dbias), _ = pull.step(k, v, k_index, ())
    return pull.finalize(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, _like(dbias, bias_params)


blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _like(tree: Any, reference: Any) -> Any:
    return jax.tree.map(lambda x, r: x.astype(r.dtype), tree, reference)


def _matmul(a: jax.Array, b: jax.Array, spec: KernelSpec) -> jax.Array:
    return jnp.matmul(a.astype(spec.tile_dtype), b.astype(spec.tile_dtype), preferred_element_type=spec.wide)


def _turn(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _logits(spec: KernelSpec, masked: bool, raw, q_index: Index, k_index: Index, bias_params) -> tuple[jax.Array, jax.Array]:
    """Logits of a tile `[rows, heads, G·bq, bk]` from `raw` = q·k, divided by `spec.exponent_scale`, and those before bias and mask
    (for softcap's derivative)."""
    capped = raw if spec.prescaled or spec.exponent_scale != 1.0 else raw * spec.scale
    if spec.softcap is not None:
        capped = spec.softcap * jnp.tanh(capped / spec.softcap)
    logits = capped
    split = (*raw.shape[:2], -1, q_index.order.shape[-1], raw.shape[-1])
    if spec.bias is not None:
        tile = spec.bias(bias_params, q_index.positions, k_index.positions)
        logits = logits + tile.reshape(raw.shape).astype(raw.dtype)
    if masked:
        seen = visible(spec.mask, q_index, k_index)[:, None, None]
        logits = jnp.where(seen, logits.reshape(split), MASKED).reshape(raw.shape)
    return logits, capped


def _rounded_exp(x: jax.Array) -> jax.Array:
    """exp(x) in bfloat16 for float32 x of at most about 0, for `spec.rounds_exp`.

    The whole part of the power of two is put into the bits of the exponent, the rest is a polynomial whose relative error is 1e-4,
    a fortieth of bfloat16's (as FlashAttention-4 does on GPUs, arXiv 2603.05451). XLA's own exponential, rounded, takes twice as
    long.
    """
    # At 2^-127 the bits are those of 0.
    x = jnp.maximum(x * math.log2(math.e), -127.0)
    whole = jnp.floor(x)
    part = x - whole
    power = ((0.07711909 * part + 0.2275643) * part + 0.6951461) * part + 1.0
    bits = jax.lax.bitcast_convert_type(power, jnp.uint32) + (whole.astype(jnp.int32).astype(jnp.uint32) << 23)
    # To the nearest bfloat16: half of its last bit is added and the rest cut off.
    return jax.lax.bitcast_convert_type(((bits + 0x8000) >> 16).astype(jnp.uint16), jnp.bfloat16)


def _take(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _visits(spec: KernelSpec, q_index: Index, k_bounds: Bounds) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The key blocks in a query block's order, fully visible first, then masked, and where each of the two parts ends."""
    return visits(spec.mask, block_bounds(jax.tree.map(lambda x: x[None], q_index)), k_bounds)


def _fold_queries(spec: KernelSpec, q, q_index, kv_heads):
    q = q.astype(spec.tile_dtype)
    q = fold(q * spec.scale if spec.prescaled else q, spec.tiles.q, spec.tiles, kv_heads)
    return q, fold_index(q_index, spec.tiles.q, spec.tiles, kv_heads)


def _fold_keys(spec: KernelSpec, k, v, k_index):
    kv_heads = k.shape[2]
    k, v = (fold(x.astype(spec.tile_dtype), spec.tiles.k, spec.tiles, kv_heads) for x in (k, v))
    return k, v, fold_index(k_index, spec.tiles.k, spec.tiles, kv_heads)


def _forward(spec: KernelSpec, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, bias_params):
    (B, _, N, _), K, blocks = q_BTNH.shape, k_BSKH.shape[2], spec.tiles
    if N % K or B % blocks.rows or K % blocks.heads or (spec.bias is not None and blocks.heads != K):
        raise ValueError(f"{blocks} must divide {B} rows, {N} heads and {K} KV heads (a bias needs all heads in one group)")
    q, q_index = _fold_queries(spec, q_BTNH, q_index, k_BSKH.shape[2])
    k, v, k_index = _fold_keys(spec, k_BSKH, v_BSKH, k_index)
    exp = _rounded_exp if spec.rounds_exp else jnp.exp
    if spec.rounds_exp:
        # The product with values sums the probabilities, too.
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], ONES), v.dtype)], axis=-1)

    def group(args):
        q, kT, v, q_index, k_index = args
        k_bounds = block_bounds(k_index)

        def query_block(args):
            q, q_index = args

            order, whole, end = _visits(spec, q_index, k_bounds)

            def tile(masked, i, carry):
                (top, total, acc), j = carry, order[i]
                kT_j, v_j, k_j = _take((kT, v, k_index), j)
                logits, _ = _logits(spec, masked, _matmul(q, kT_j, spec), q_index, k_j, bias_params)
                new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
                # A row without a visible key so far has new_top = MASKED; halving it keeps exp(MASKED - ...) at 0 there.
                safe = jnp.maximum(new_top, MASKED / 2)
                p = exp((logits - safe[..., None]) * spec.exponent_scale)
                shrink = jnp.exp((top - safe) * spec.exponent_scale)
                acc = acc * shrink[..., None] + _matmul(p, v_j, spec)
                return new_top, total if spec.rounds_exp else total * shrink + jnp.sum(p, axis=-1), acc

            rows = q.shape[:-1]
            start = (jnp.full(rows, MASKED, spec.wide), jnp.zeros(rows, spec.wide), jnp.zeros((*rows, v.shape[-1]), spec.wide))
            visible_part = jax.lax.fori_loop(0, whole, functools.partial(tile, False), start)
            top, total, acc = jax.lax.fori_loop(whole, end, functools.partial(tile, True), visible_part)
            if spec.rounds_exp:
                total, acc = acc[..., -1], acc[..., :-ONES]
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)
            lse = jnp.where(empty, -jnp.inf, top * spec.exponent_scale + jnp.log(total))
            return (acc / total[..., None]).astype(spec.out_dtype), lse[..., None]

        return jax.lax.map(query_block, (q, q_index))

    o, lse = jax.lax.map(group, (q, _turn(k), v, q_index, k_index))
    o = unfold(o, spec.tiles.q, spec.tiles, q_BTNH.shape)
    return o, unfold(lse, spec.tiles.q, spec.tiles, (*q_BTNH.shape[:3], 1))[..., 0]


class _QueryTiles(NamedTuple):
    """What the backward pass needs from the queries, in tiles."""

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array
    index: Index


def _query_residuals(spec: KernelSpec, q_BTNH, q_index, kv_heads: int, whole: Partial, cotangent: Partial) -> _QueryTiles:
    at_q = functools.partial(fold, block=spec.tiles.q, blocks=spec.tiles, kv_heads=kv_heads)
    lse, delta = (at_q(x[..., None])[..., 0] for x in row_terms(whole, cotangent, spec.wide))
    q, q_index = _fold_queries(spec, q_BTNH, q_index, kv_heads)
    return _QueryTiles(q, at_q(cotangent[0].astype(spec.tile_dtype)), lse, delta, q_index)


def _backward(spec: KernelSpec, queries: _QueryTiles, bias_params, k_BSKH, v_BSKH, k_index):
    """The gradients; dq in tiles like `queries`."""
    k, v, k_index = _fold_keys(spec, k_BSKH, v_BSKH, k_index)
    exp = _rounded_exp if spec.rounds_exp else jnp.exp
    zero_bias = jax.tree.map(lambda x: jnp.zeros(x.shape, spec.wide), bias_params)

    def group(dbias, args):
        queries, k, v, k_index = args
        kT, vT, k_bounds = _turn(k), _turn(v), block_bounds(k_index)

        def query_block(carry, args):
            q, do, lse, delta, q_index = args
            qT, doT = _turn(q), _turn(do)

            order, whole, end = _visits(spec, q_index, k_bounds)

            def tile(masked, i, carry):
                (dq, dkT, dvT, dbias), j = carry, order[i]
                k_j, kT_j, vT_j, index_j = _take((k, kT, vT, k_index), j)
                logits, capped = _logits(spec, masked, _matmul(q, kT_j, spec), q_index, index_j, bias_params)
                p = exp(logits * spec.exponent_scale - lse[..., None])
                if spec.rounds_exp:
                    # XLA takes it for cheap, and would compute it again for ds.
                    p = jax.lax.optimization_barrier(p)
                ds = p.astype(spec.wide) * (_matmul(do, vT_j, spec) - delta[..., None])
                if spec.bias is not None:
                    dbias = _add_bias_cotangent(spec, dbias, ds, q_index, index_j, bias_params)
                if spec.softcap is not None:
                    ds = ds * (1.0 - jnp.square(capped / spec.softcap))
                dq = dq + _matmul(ds, k_j, spec)
                dkT = _add_at(dkT, j, _matmul(qT, ds, spec))
                return dq, dkT, _add_at(dvT, j, _matmul(doT, p, spec)), dbias

            visible_part = jax.lax.fori_loop(0, whole, functools.partial(tile, False), (jnp.zeros(q.shape, spec.wide), *carry))
            dq, *carry = jax.lax.fori_loop(whole, end, functools.partial(tile, True), visible_part)
            return tuple(carry), dq

        start = (jnp.zeros(kT.shape, spec.wide), jnp.zeros(kT.shape, spec.wide), dbias)
        (dkT, dvT, dbias), dq = jax.lax.scan(query_block, start, queries)
        return dbias, (dq * spec.scale, _turn(dkT) * (1.0 if spec.prescaled else spec.scale), _turn(dvT))

    dbias, (dq, dk, dv) = jax.lax.scan(group, zero_bias, (queries, k, v, k_index))
    dk, dv = (unfold(x, spec.tiles.k, spec.tiles, k_BSKH.shape) for x in (dk, dv))
    return dq, dk, dv, dbias


def _add_at(total: jax.Array, j: jax.Array, part: jax.Array) -> jax.Array:
    """total[j] += part, in place under a loop."""
    old = jax.lax.dynamic_index_in_dim(total, j, 0, keepdims=True)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part[None], j, 0)


def _add_bias_cotangent(spec: KernelSpec, dbias, ds, q_index: Index, k_index: Index, bias_params):
    """Adds the pull-back of a tile's logit cotangent through the bias function."""
    assert spec.bias is not None
    bias = spec.bias
    tile, pull = jax.vjp(lambda p: bias(p, q_index.positions, k_index.positions), bias_params)
    (part,) = pull(ds.reshape(tile.shape).astype(tile.dtype))
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), dbias, part)
