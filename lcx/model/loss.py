"""Next-token loss, tiled over the vocabulary so that the logits of a long sequence never exist all at once.

Legend: B batch, T tokens, D model, V vocabulary, C vocabulary entries in a tile.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from lcx.core.batch import PADDING, Batch, cut_tokens, join_tokens
from lcx.core.mesh import SEQUENCE, axis_size, context_size
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture
from lcx.model.config import ModelConfig
from lcx.model.linear import effective_kernel, head_logits
from lcx.model.tiles import count_tiles, shard_length

LEAST_ENTRIES = 2048
"""Entries of the vocabulary in a tile below which tokens are cut instead: products of that width keep a chip's matrix unit busy."""


@flax.struct.dataclass
class LossSums:
    """Sums over the tokens of a batch, float32 scalars; divide by `weight` once, after summing over all devices and microbatches.

    `nll` is Σ w·ℓ in nats, `weight` Σ w, `z` Σ w·lse² (the z-loss, which has the same denominator), `correct` Σ w·[the target is
    the most likely token]. If the experts' balance has a weight, `router_aux` is Σ n·(load-balancing loss) over the microbatches
    and `tokens` Σ n, its own denominator, where n is the number of tokens of a microbatch that are not padding. If the batch says
    which part of a mixture its rows come from, `part_nll` and `part_weight` `[P]` are Σ w·ℓ and Σ w over the rows of each part.
    """

    nll: jax.Array
    weight: jax.Array
    z: jax.Array
    correct: jax.Array
    router_aux: jax.Array | None = None
    tokens: jax.Array | None = None
    part_nll: jax.Array | None = None
    part_weight: jax.Array | None = None

    @classmethod
    def zeros(cls, batch: Batch, balanced: bool) -> "LossSums":
        """What the sums of microbatches like `batch` are added to; `balanced` if the experts' balance has a weight."""
        scalars = (jnp.zeros((), jnp.float32) for _ in range(6 if balanced else 4))
        parts = None if batch.row_parts is None else jnp.zeros(batch.num_parts, jnp.float32)
        return cls(*scalars, part_nll=parts, part_weight=parts)


@flax.struct.dataclass
class TokenLosses:
    """Per token, each `[B, T]`: `nll` and `lse` float32 in nats, `correct` boolean."""

    nll: jax.Array
    lse: jax.Array
    correct: jax.Array


def loss_sums(params: Tree, hidden: jax.Array, batch: Batch, arch: Architecture, router_aux: jax.Array | None = None) -> LossSums:
    """Weighted sums of the next-token loss; `hidden` is `[B, T, D]`, `router_aux` a scalar or None of `hidden_states`."""
    tokens = None if router_aux is None else unpadded_tokens(batch)
    losses = token_losses(params, hidden, batch.targets, arch)
    weights = batch.loss_weights.astype(jnp.float32)
    part_nll = part_weight = None
    if batch.row_parts is not None:
        part_nll = sums_by_part(jax.lax.stop_gradient(losses.nll) * weights, batch.row_parts, batch.num_parts)
        part_weight = sums_by_part(weights, batch.row_parts, batch.num_parts)
    return LossSums(
        nll=jnp.sum(losses.nll * weights),
        weight=jnp.sum(weights),
        z=jnp.sum(jnp.square(losses.lse) * weights),
        correct=jnp.sum(losses.correct * weights),
        router_aux=None if router_aux is None or tokens is None else router_aux * tokens,
        tokens=tokens,
        part_nll=part_nll,
        part_weight=part_weight,
    )


def sums_by_part(x: jax.Array, row_parts: jax.Array, num_parts: int) -> jax.Array:
    """The sum of `x` `[B, T]` over the rows of each part, float32 `[P]`; `row_parts` int32 `[B]` are the rows' parts.

    Rows are summed before parts, so that a device passes on a number a row; a row that is not finite spoils its own part only.
    """
    own = row_parts[:, None] == jnp.arange(num_parts, dtype=jnp.int32)[None]
    return jnp.sum(jnp.where(own, jnp.sum(x, axis=1)[:, None], 0.0), axis=0)


def unpadded_tokens(batch: Batch) -> jax.Array:
    """The number of tokens that are not padding, a float32 scalar."""
    return jnp.sum(batch.segments != PADDING, dtype=jnp.float32)


def token_losses(params: Tree, hidden: jax.Array, targets: jax.Array, arch: Architecture) -> TokenLosses:
    """Loss of every token, unweighted; differentiable with respect to `params` and `hidden`."""
    config = arch.config
    table = _output_table(params, config).astype(hidden.dtype)
    tiles, entries = _tile(hidden, arch)
    run = functools.partial(_tiled, tiles=tiles, entries=entries, softcap=config.logit_softcap)
    if tiles > 1 and context_size() > 1:
        tokens = PartitionSpec(None, SEQUENCE)
        split = {"in_specs": (tokens, PartitionSpec(), tokens), "out_specs": tokens, "axis_names": set(SEQUENCE)}
        run = jax.shard_map(run, **split, check_vma=False)
    found: Any = run(hidden, table, targets)
    lse, chosen, best = found
    return TokenLosses(nll=lse - chosen, lse=lse, correct=chosen >= best)


def logits(params: Tree, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """All logits `[..., V]` float32: for a few positions, as decoding needs them."""
    kernel = output_kernel(params, config).astype(hidden.dtype)
    return _cap(head_logits(kernel, hidden), config.logit_softcap)


def output_kernel(params: Tree, config: ModelConfig) -> jax.Array:
    """The `[D, V]` output weights, tied or not."""
    return params["embed"]["embedding"].T if config.tied_embeddings else effective_kernel(params["head"], 1)


def _output_table(params: Tree, config: ModelConfig) -> jax.Array:
    """The output weights as `[V, D]`: a tied table of embeddings as it lies in memory, of which tiles are no copies."""
    return params["embed"]["embedding"] if config.tied_embeddings else effective_kernel(params["head"], 1).T


def _tile(hidden: jax.Array, arch: Architecture) -> tuple[int, int]:
    """Tiles of a device's tokens, and entries of the vocabulary in a tile: a whole part of it, unless that is far less than fit."""
    rows, length, most = hidden.shape[0], hidden.shape[1], arch.execution.loss_tile
    mesh, least = jax.sharding.get_abstract_mesh(), min(LEAST_ENTRIES, arch.config.vocab_size)
    here = rows if mesh.empty else -(-rows // axis_size(mesh, "batch"))
    tiles = 1
    if here * shard_length(length) * least > most and length % context_size() == 0:
        tiles = count_tiles(shard_length(length), max(1, most // (2 * least) // here))
    tokens = rows * length if tiles == 1 else here * shard_length(length) // tiles
    pieces, vocab = -(-tokens * arch.config.vocab_size // most), arch.config.vocab_size
    pieces = next((count for count in range(pieces, pieces * 3 // 2 + 1) if vocab % count == 0), pieces)
    return tiles, -(-vocab // pieces)


def _cap(raw: jax.Array, softcap: float | None) -> jax.Array:
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


def _tiles(table: jax.Array, entries: int) -> tuple[jax.Array, jax.Array]:
    """The output weights as `[V/C, C, D]`, the last tile filled with zeros, and the first vocabulary entry of each tile."""
    count = -(-table.shape[0] // entries)
    padded = jnp.pad(table, ((0, count * entries - table.shape[0]), (0, 0)))
    return padded.reshape(count, entries, -1), jnp.arange(count, dtype=jnp.int32) * entries


def _tile_logits(hidden: jax.Array, weights: jax.Array, start: jax.Array, vocab: int, softcap: float | None) -> tuple:
    raw = jnp.einsum("btd,cd->btc", hidden, weights, preferred_element_type=jnp.float32)
    entries = start + jnp.arange(weights.shape[0], dtype=jnp.int32)[None, None]
    return jnp.where(entries < vocab, _cap(raw, softcap), -jnp.inf), raw, entries


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _tiled(hidden: jax.Array, table: jax.Array, targets: jax.Array, tiles: int, entries: int, softcap: float | None) -> tuple:
    """Log-sum-exp, the target's logit and the largest logit, each float32 `[B, T]`; the last carries no gradient.

    `tiles` of the tokens one after another, and for each the vocabulary in tiles of so many `entries`.
    """
    if tiles == 1:
        return _lse_chosen_best(hidden, table, targets, entries, softcap)

    def one(part: Any) -> tuple:
        return _lse_chosen_best(part[0], table, part[1], entries, softcap)

    return join_tokens(jax.lax.map(one, cut_tokens((hidden, targets), tiles)))


def _tiled_forward(hidden: Any, table: Any, targets: Any, tiles: int, entries: int, softcap: float | None) -> tuple:
    found: Any = _tiled(hidden.value, table.value, targets.value, tiles, entries, softcap)
    # Frozen weights get no gradient, which takes a third of the time: what is saved says so by its structure.
    return found, (hidden.value, table.value, targets.value, found[0], () if table.perturbed else None)


def _lse_chosen_best(hidden: jax.Array, table: jax.Array, targets: jax.Array, entries: int, softcap: float | None) -> tuple:
    vocab = table.shape[0]

    def step(carry: tuple, tile_: tuple) -> tuple:
        best, total, chosen = carry
        weights, first = tile_
        values, _, entries = _tile_logits(hidden, weights, first, vocab, softcap)
        new_best = jnp.maximum(best, jnp.max(values, axis=-1))
        total = total * jnp.exp(best - new_best) + jnp.sum(jnp.exp(values - new_best[..., None]), axis=-1)
        chosen = chosen + jnp.sum(jnp.where(entries == targets[..., None], values, 0.0), axis=-1)
        return (new_best, total, chosen), None

    shape = targets.shape
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape))
    weights, firsts = _tiles(table, entries)
    if weights.shape[0] == 1:
        (best, total, chosen), _ = step(start, (weights[0], firsts[0]))
    else:
        (best, total, chosen), _ = jax.lax.scan(step, start, (weights, firsts))
    lse = best + jnp.log(total)
    return lse, chosen, best


def _tiled_backward(tiles: int, entries: int, softcap: float | None, saved: tuple, cotangents: tuple) -> tuple:
    hidden, table, targets, lse, trained = saved
    d_lse, d_chosen = (jnp.zeros(lse.shape) if isinstance(d, SymbolicZero) else d for d in cotangents[:2])
    weights, firsts = _tiles(table, entries)
    pull = functools.partial(_pull_back, weights=weights, firsts=firsts, vocab=table.shape[0], softcap=softcap, trained=trained)
    if tiles == 1:
        d_hidden, d_tiles = pull(hidden, targets, lse, d_lse, d_chosen)
    else:

        def one(total: Any, part: tuple) -> tuple:
            d_hidden, found = pull(*part)
            return jax.tree.map(jnp.add, total, found), d_hidden.astype(hidden.dtype)

        zeros = None if trained is None else jnp.zeros(weights.shape, jnp.float32)
        d_tiles, d_hidden = jax.lax.scan(one, zeros, cut_tokens((hidden, targets, lse, d_lse, d_chosen), tiles))
        d_hidden = join_tokens(d_hidden)
    d_table = None if d_tiles is None else d_tiles.reshape(-1, table.shape[1])[: table.shape[0]].astype(table.dtype)
    return d_hidden.astype(hidden.dtype), d_table, None


def _pull_back(
    hidden: jax.Array,
    targets: jax.Array,
    lse: jax.Array,
    d_lse: jax.Array,
    d_chosen: jax.Array,
    *,
    weights: jax.Array,
    firsts: jax.Array,
    vocab: int,
    softcap: float | None,
    trained: tuple | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The float32 gradients of `hidden` and of the tiles `weights` `[V/C, C, D]`; None for weights that are not trained."""

    def step(d_hidden: jax.Array, tile_: tuple) -> tuple[jax.Array, jax.Array | None]:
        weights, first = tile_
        values, raw, entries = _tile_logits(hidden, weights, first, vocab, softcap)
        slope = jnp.exp(values - lse[..., None]) * d_lse[..., None]
        slope = slope + jnp.where(entries == targets[..., None], d_chosen[..., None], 0.0)
        if softcap is not None:
            slope = slope * (1 - jnp.square(jnp.tanh(raw / softcap)))
        slope = slope.astype(hidden.dtype)
        d_hidden = d_hidden + jnp.einsum("btc,cd->btd", slope, weights, preferred_element_type=jnp.float32)
        if trained is None:
            return d_hidden, None
        return d_hidden, jnp.einsum("btc,btd->cd", slope, hidden, preferred_element_type=jnp.float32)

    start = jnp.zeros(hidden.shape, jnp.float32)
    if weights.shape[0] > 1:
        return jax.lax.scan(step, start, (weights, firsts))
    d_hidden, d_tile = step(start, (weights[0], firsts[0]))
    return d_hidden, None if d_tile is None else d_tile[None]


_tiled.defvjp(_tiled_forward, _tiled_backward, symbolic_zeros=True)
