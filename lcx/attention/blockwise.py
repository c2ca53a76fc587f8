"""Attention in tiles with an online softmax, in pure JAX: linear memory, its own VJP, and no work on blocks that the mask hides.

Legend: B batch, T query tokens, S key tokens, N heads, K KV heads, G = N/K, H head dim. Inside a group (see `tiles`) a tile of
logits is `[rows, heads, G·block_q, block_k]`: the G query heads of a KV head are stacked along the rows, so keys are never
repeated. Every matrix product has both operands in row-major order (keys and values are transposed once, outside the loops),
since XLA's CPU backend is several times slower on the transposed forms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcx.attention.dense import MASKED
from lcx.attention.partial import AttentionVjp, Partial, with_barrier
from lcx.attention.tiles import Blocks, block_bounds, fold, fold_index, row_terms, unfold, visits
from lcx.core.batch import Index
from lcx.core.mask import Bounds, Mask, visible

Bias = Callable[[Any, jax.Array, jax.Array], jax.Array]

SAVED = "attention"
"""Name of o and lse for rematerialisation policies: if they are saved, the forward pass over the tiles is not run again."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The static arguments of one call."""

    mask: Mask
    bias: Bias | None
    scale: float
    softcap: float | None
    blocks: Blocks
    tile_dtype: Any
    out_dtype: Any

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.tile_dtype, jnp.float32)

    @property
    def prescaled(self) -> bool:
        """Whether to multiply q by the scale, where that costs no precision; otherwise every tile of logits is read once more."""
        return self.tile_dtype == self.wide


def blockwise(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_index: Index,
    k_index: Index,
    mask: Mask,
    *,
    bias: Bias | None = None,
    bias_params: Any = None,
    scale: float,
    softcap: float | None = None,
    blocks: Blocks,
    tile_dtype: Any = None,
    out_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The same function as `dense`, without ever holding a T×S array; T and S need not be multiples of the blocks.

    Returns `o_BTNH` (`out_dtype`, default q's) and float32 `lse_BTN`; both are differentiable, and so are the float leaves of
    `bias_params`. `tile_dtype` is the dtype in which tiles are multiplied (default q's; sums are float32 or wider anyway).
    `blocks.rows` must divide B and `blocks.heads` must divide K; with a bias, which is computed for all heads at once,
    `blocks.heads` must be K. Follows FlashAttention-2 (arXiv 2307.08691): the backward pass recomputes tiles from q, k, v and the
    saved o and lse.
    """
    B, _, N, _ = q_BTNH.shape
    K = k_BSKH.shape[2]
    if N % K or B % blocks.rows or K % blocks.heads or (bias is not None and blocks.heads != K):
        raise ValueError(f"{blocks} must divide {B} rows, {N} heads and {K} KV heads (a bias needs all heads in one group)")
    rule = _rule(mask, bias, scale, softcap, blocks, tile_dtype or q_BTNH.dtype, out_dtype or q_BTNH.dtype)
    return _attend(rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, bias_params)


def blockwise_vjp(
    q_BTNH: jax.Array,
    q_index: Index,
    mask: Mask,
    kv_heads: int,
    *,
    bias: Bias | None = None,
    bias_params: Any = None,
    scale: float,
    softcap: float | None = None,
    blocks: Blocks,
    tile_dtype: Any = None,
    whole: Partial,
    cotangent: Partial,
) -> AttentionVjp:
    """The pull-back to any keys, with `dbias_params` after dv.

    `whole` is (o, lse) of the queries over all their keys, of which the given keys may be a part; `cotangent` is its cotangent. The
    queries' side is cut into tiles here, once, however many keys pass by.
    """
    rule = _rule(mask, bias, scale, softcap, blocks, tile_dtype or q_BTNH.dtype, whole[0].dtype)
    return _kernel_vjp(rule, q_BTNH, q_index, kv_heads, bias_params, whole, cotangent)


def _kernel_vjp(rule: _Rule, q_BTNH, q_index, kv_heads: int, bias_params, whole: Partial, cotangent: Partial) -> AttentionVjp:
    queries = _query_residuals(rule, q_BTNH, q_index, kv_heads, whole, cotangent)

    def step(k: jax.Array, v: jax.Array, k_index: Index, in_flight: Any) -> tuple[tuple[Any, ...], Any]:
        return with_barrier(_backward(rule, queries, bias_params, k, v, k_index), in_flight)

    finalize = functools.partial(unfold, block=rule.blocks.q, blocks=rule.blocks, shape=q_BTNH.shape)
    return AttentionVjp(jnp.zeros(queries.q.shape, rule.wide), step, finalize)


def _rule(mask, bias, scale, softcap, blocks, tile_dtype, out_dtype) -> _Rule:
    return _Rule(mask, bias, scale, softcap, blocks, jnp.dtype(tile_dtype), jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, q_index, k_index, bias_params):
    return _forward(rule, q, k, v, q_index, k_index, bias_params)


def _attend_fwd(rule, q, k, v, q_index, k_index, bias_params):
    o, lse = (checkpoint_name(x, SAVED) for x in _forward(rule, q, k, v, q_index, k_index, bias_params))
    return (o, lse), (q, k, v, q_index, k_index, bias_params, o, lse)


def _attend_bwd(rule, residuals, cotangents):
    q, k, v, q_index, k_index, bias_params, *whole = residuals
    pull = _kernel_vjp(rule, q, q_index, k.shape[2], bias_params, whole, cotangents)
    (dq, dk, dv, dbias), _ = pull.step(k, v, k_index, ())
    return pull.finalize(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, _like(dbias, bias_params)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _like(tree: Any, reference: Any) -> Any:
    return jax.tree.map(lambda x, r: x.astype(r.dtype), tree, reference)


def _matmul(a: jax.Array, b: jax.Array, rule: _Rule) -> jax.Array:
    return jnp.matmul(a.astype(rule.tile_dtype), b.astype(rule.tile_dtype), preferred_element_type=rule.wide)


def _turn(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _logits(rule: _Rule, masked: bool, raw, q_index: Index, k_index: Index, bias_params) -> tuple[jax.Array, jax.Array]:
    """Logits of a tile `[rows, heads, G·bq, bk]` from `raw` = q·k, and those before bias and mask (for softcap's derivative)."""
    capped = raw if rule.prescaled else raw * rule.scale
    if rule.softcap is not None:
        capped = rule.softcap * jnp.tanh(capped / rule.softcap)
    logits = capped
    split = (*raw.shape[:2], -1, q_index.order.shape[-1], raw.shape[-1])
    if rule.bias is not None:
        tile = rule.bias(bias_params, q_index.positions, k_index.positions)
        logits = logits + tile.reshape(raw.shape).astype(raw.dtype)
    if masked:
        seen = visible(rule.mask, q_index, k_index)[:, None, None]
        logits = jnp.where(seen, logits.reshape(split), MASKED).reshape(raw.shape)
    return logits, capped


def _take(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _visit_tiles(rule: _Rule, q_index: Index, k_bounds: Bounds, tile: Callable, carry: Any) -> Any:
    """Runs `tile(masked, j, carry)` over the key blocks j that the query block may see: fully visible first, then masked."""
    q_bounds = block_bounds(jax.tree.map(lambda x: x[None], q_index))
    order, whole, end = visits(rule.mask, q_bounds, k_bounds)
    carry = jax.lax.fori_loop(0, whole, lambda i, c: tile(False, order[i], c), carry)
    return jax.lax.fori_loop(whole, end, lambda i, c: tile(True, order[i], c), carry)


def _fold_queries(rule: _Rule, q, q_index, kv_heads):
    q = q.astype(rule.tile_dtype)
    q = fold(q * rule.scale if rule.prescaled else q, rule.blocks.q, rule.blocks, kv_heads)
    return q, fold_index(q_index, rule.blocks.q, rule.blocks, kv_heads)


def _fold_keys(rule: _Rule, k, v, k_index):
    kv_heads = k.shape[2]
    k, v = (fold(x.astype(rule.tile_dtype), rule.blocks.k, rule.blocks, kv_heads) for x in (k, v))
    return k, v, fold_index(k_index, rule.blocks.k, rule.blocks, kv_heads)


def _forward(rule: _Rule, q_BTNH, k_BSKH, v_BSKH, q_index, k_index, bias_params):
    q, q_index = _fold_queries(rule, q_BTNH, q_index, k_BSKH.shape[2])
    k, v, k_index = _fold_keys(rule, k_BSKH, v_BSKH, k_index)

    def group(args):
        q, kT, v, q_index, k_index = args
        k_bounds = block_bounds(k_index)

        def query_block(args):
            q, q_index = args

            def tile(masked, j, carry):
                top, total, acc = carry
                kT_j, v_j, k_j = _take((kT, v, k_index), j)
                logits, _ = _logits(rule, masked, _matmul(q, kT_j, rule), q_index, k_j, bias_params)
                new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
                # A row without a visible key so far has new_top = MASKED; halving it keeps exp(MASKED - ...) at 0 there.
                safe = jnp.maximum(new_top, MASKED / 2)
                p = jnp.exp(logits - safe[..., None])
                shrink = jnp.exp(top - safe)
                acc = acc * shrink[..., None] + _matmul(p, v_j, rule)
                return new_top, total * shrink + jnp.sum(p, axis=-1), acc

            rows = q.shape[:-1]
            start = (jnp.full(rows, MASKED, rule.wide), jnp.zeros(rows, rule.wide), jnp.zeros(q.shape, rule.wide))
            top, total, acc = _visit_tiles(rule, q_index, k_bounds, tile, start)
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)
            lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
            return (acc / total[..., None]).astype(rule.out_dtype), lse[..., None]

        return jax.lax.map(query_block, (q, q_index))

    o, lse = jax.lax.map(group, (q, _turn(k), v, q_index, k_index))
    o = unfold(o, rule.blocks.q, rule.blocks, q_BTNH.shape)
    return o, unfold(lse, rule.blocks.q, rule.blocks, (*q_BTNH.shape[:3], 1))[..., 0]


class _QueryTiles(NamedTuple):
    """What the backward pass needs from the queries, in tiles."""

    q: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array
    index: Index


def _query_residuals(rule: _Rule, q_BTNH, q_index, kv_heads: int, whole: Partial, cotangent: Partial) -> _QueryTiles:
    at_q = functools.partial(fold, block=rule.blocks.q, blocks=rule.blocks, kv_heads=kv_heads)
    lse, delta = (at_q(x[..., None])[..., 0] for x in row_terms(whole, cotangent, rule.wide))
    q, q_index = _fold_queries(rule, q_BTNH, q_index, kv_heads)
    return _QueryTiles(q, at_q(cotangent[0].astype(rule.tile_dtype)), lse, delta, q_index)


def _backward(rule: _Rule, queries: _QueryTiles, bias_params, k_BSKH, v_BSKH, k_index):
    """The gradients; dq in tiles like `queries`."""
    k, v, k_index = _fold_keys(rule, k_BSKH, v_BSKH, k_index)
    zero_bias = jax.tree.map(lambda x: jnp.zeros(x.shape, rule.wide), bias_params)

    def group(dbias, args):
        queries, k, v, k_index = args
        kT, vT, k_bounds = _turn(k), _turn(v), block_bounds(k_index)

        def query_block(carry, args):
            q, do, lse, delta, q_index = args
            qT, doT = _turn(q), _turn(do)

            def tile(masked, j, carry):
                dq, dkT, dvT, dbias = carry
                k_j, kT_j, vT_j, index_j = _take((k, kT, vT, k_index), j)
                logits, capped = _logits(rule, masked, _matmul(q, kT_j, rule), q_index, index_j, bias_params)
                p = jnp.exp(logits - lse[..., None])
                ds = p * (_matmul(do, vT_j, rule) - delta[..., None])
                if rule.bias is not None:
                    dbias = _add_bias_cotangent(rule, dbias, ds, q_index, index_j, bias_params)
                if rule.softcap is not None:
                    ds = ds * (1.0 - jnp.square(capped / rule.softcap))
                dq = dq + _matmul(ds, k_j, rule)
                dkT = _add_at(dkT, j, _matmul(qT, ds, rule))
                return dq, dkT, _add_at(dvT, j, _matmul(doT, p, rule)), dbias

            dq, *carry = _visit_tiles(rule, q_index, k_bounds, tile, (jnp.zeros(q.shape, rule.wide), *carry))
            return tuple(carry), dq

        start = (jnp.zeros(kT.shape, rule.wide), jnp.zeros(kT.shape, rule.wide), dbias)
        (dkT, dvT, dbias), dq = jax.lax.scan(query_block, start, queries)
        return dbias, (dq * rule.scale, _turn(dkT) * (1.0 if rule.prescaled else rule.scale), _turn(dvT))

    dbias, (dq, dk, dv) = jax.lax.scan(group, zero_bias, (queries, k, v, k_index))
    dk, dv = (unfold(x, rule.blocks.k, rule.blocks, k_BSKH.shape) for x in (dk, dv))
    return dq, dk, dv, dbias


def _add_at(total: jax.Array, j: jax.Array, part: jax.Array) -> jax.Array:
    """total[j] += part, in place under a loop."""
    old = jax.lax.dynamic_index_in_dim(total, j, 0, keepdims=True)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part[None], j, 0)


def _add_bias_cotangent(rule: _Rule, dbias, ds, q_index: Index, k_index: Index, bias_params):
    """Adds the pull-back of a tile's logit cotangent through the bias function."""
    tile, pull = jax.vjp(lambda p: rule.bias(p, q_index.positions, k_index.positions), bias_params)
    (part,) = pull(ds.reshape(tile.shape).astype(tile.dtype))
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), dbias, part)
