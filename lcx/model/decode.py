"""Greedy generation with a key-value cache: chunked prefill, then one token at a time, on one device or a mesh that is set.

Legend: B batch, T tokens of a chunk, S cache slots, K key-value heads, H head dim, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lcx.attention.dispatch import attend
from lcx.core.batch import Index
from lcx.core.errors import UserError
from lcx.core.mesh import context_size
from lcx.core.trees import Tree
from lcx.model.cache import (
    Cache,
    check_chunk,
    check_room,
    collect,
    deal,
    empty_cache,
    keep_placed,
    scheme_fingerprint,
    write,
    write_index,
)
from lcx.model.config import Architecture
from lcx.model.loss import logits
from lcx.model.transformer import KindContext, cast_params, embed, layers, rms_norm
from lcx.positions.form import Form, Piece
from lcx.positions.rotary import rotate, tables

CHUNK = 512
"""Tokens that are prefilled at a time unless said otherwise."""


def extend(params: Tree, arrays: Tree, arch: Architecture, cache: Cache, tokens: jax.Array, index: Index, start: int) -> tuple:
    """Run a chunk of tokens `[B, T]`, numbers `start … start + T` of their rows; gives (hidden `[B, T, D]`, cache).

    Under a mesh whose context has n devices (`jax.set_mesh`), T is a multiple of n or at most n. Chunks follow one another and
    the cache is consumed. Tokens of segment `PADDING` are stored and never seen; keys marked by `index.prefix` are seen by their
    own chunk and later ones. Raises `UserError` when the slots do not exist, the chunk can't be dealt or the cache was made under
    other frequencies.
    """
    check_room(arch, cache, tokens.shape[1], start)
    if cache.scheme != scheme_fingerprint(arch, arrays):
        raise UserError("the cache was filled under other positional frequencies; prefill again under the present ones")
    # Tokens that all devices compute are not dealt: every decoding step is one program, whosever turn it is.
    turn = 0 if tokens.shape[1] % context_size() else start % context_size()
    return _extend(params, arrays, arch, cache, tokens, index, jnp.int32(start), turn)


@functools.partial(jax.jit, static_argnames=("arch", "turn"), donate_argnames=("cache",))
def _extend(
    params: Tree, arrays: Tree, arch: Architecture, cache: Cache, tokens: jax.Array, index: Index, start: jax.Array, turn: int
) -> tuple:
    """`turn`: the device that `start` goes to."""
    params = cast_params(params, arch.config)
    tokens, index = deal((tokens, index), turn)
    slots = {kind: write_index(old, index, start) for kind, old in cache.index.items()}
    context = {kind: KindContext.build(arch, kind, params, arrays, index) for kind in slots}
    raw = {kind: tables(arch.form(kind), arrays[kind], at.positions) for kind, at in slots.items() if kind not in cache.rotated}

    def cached(kind: str, nth: jax.Array | int, layer: Tree, state: tuple, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        here, spec = context[kind], arch.attention(kind)
        if kind in cache.rotated:
            k, form = rotate_keys(spec.form, k, here.tables)
            spec = dataclasses.replace(spec, form=form)
        state = tuple({**old, kind: write(old[kind], new, nth, start)} for old, new in zip(state, (k, v), strict=True))
        keys, values = (jax.lax.dynamic_index_in_dim(x[kind], nth, keepdims=False) for x in state)
        out = attend(
            spec, q, keys, values, index, slots[kind],
            q_tables=here.tables, k_tables=raw.get(kind, {}), bias_params=here.bias, temperature=here.temperature,
            sinks=layer["attention"].get("sinks"), cached=True,
        )  # fmt: skip
        return out, state

    x = embed(params, arrays, arch, tokens, index.positions)
    x, (keys, values), _ = layers(params["layers"], x, arch.config, cached, (cache.keys, cache.values))
    hidden = collect(rms_norm(params["final_norm"], x, arch.config), turn)
    return hidden, keep_placed(cache.replace(keys=keys, values=values, index=slots))


def rotate_keys(form: Form, k: jax.Array, tables_: Tree) -> tuple[jax.Array, Form]:
    """Keys rotated for the only piece of `form`, and the form that attention over such keys takes."""
    (piece,) = form.pieces
    if piece.k_phase is None:
        return k, form
    return rotate(k, *tables_[piece.k_phase], form.layout), dataclasses.replace(
        form, pieces=(Piece(piece.q_phase, None, piece.band),)
    )


def generate(
    params: Tree, arrays: Tree, arch: Architecture, prompts: list[np.ndarray], max_new_tokens: int, *, chunk: int | None = None,
) -> np.ndarray:  # fmt: skip
    """The most likely continuation of each prompt, int32 `[B, max_new_tokens]`.

    `prompts` are int arrays of any lengths ≥ 1; shorter ones are padded on the left, out of sight. `arrays` must be laid out for
    the longest prompt plus `max_new_tokens`. `chunk` tokens are prefilled at a time (None: 512, rounded up to the context), at
    most the longest prompt's.

    Under a mesh that is set (`jax.set_mesh`, weights placed on it as in training) rows are split over its batch axes where their
    number divides, and tokens and cache over its context (`model.cache`), whose size must divide `chunk`. Raises `UserError` where
    a number does not fit.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise UserError("every prompt needs at least one token")
    size, longest = context_size(), int(lengths.max())
    if chunk is None:
        chunk = _round_up(CHUNK, size)
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1")
    check_chunk("a chunk", chunk)
    chunk = min(chunk, longest if longest <= size else _round_up(longest, size))
    width = _round_up(longest, chunk)
    order = np.broadcast_to(np.arange(width, dtype=np.int32), (len(prompts), width))
    offset = (width - lengths)[:, None].astype(np.int32)
    tokens = np.stack([np.pad(np.asarray(p, np.int32), (width - len(p), 0)) for p in prompts])
    real = order >= offset
    index = Index(jnp.asarray(order), jnp.asarray(np.maximum(order - offset, 0)), jnp.asarray(real.astype(np.int32)))
    cache = empty_cache(arch, arrays, len(prompts), width + max_new_tokens, chunk)
    for start in range(0, width, chunk):
        part = jnp.asarray(tokens[:, start : start + chunk])
        hidden, cache = extend(params, arrays, arch, cache, part, index.slice(start, chunk), start)
    token = _best(params, hidden[:, -1], arch)
    out = [token]
    for step in range(max_new_tokens - 1):
        row = jnp.full((len(prompts), 1), width + step, jnp.int32)
        here = Index(row, row - jnp.asarray(offset), jnp.ones_like(row))
        hidden, cache = extend(params, arrays, arch, cache, token[:, None], here, width + step)
        token = _best(params, hidden[:, -1], arch)
        out.append(token)
    return np.stack([np.asarray(token) for token in out], axis=1)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("arch",))
def _best(params: Tree, hidden: jax.Array, arch: Architecture) -> jax.Array:
    best = jnp.argmax(logits(params, hidden, arch.config), axis=-1).astype(jnp.int32)
    if jax.sharding.get_abstract_mesh().empty:
        return best
    # On every device of every host: all of them go on from it.
    return jax.lax.with_sharding_constraint(best, PartitionSpec())
