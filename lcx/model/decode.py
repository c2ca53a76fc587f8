"""Greedy generation with a key-value cache: chunked prefill, then one token at a time.

Legend: B batch, T tokens of a chunk, S cache slots, K key-value heads, H head dim, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.dispatch import attend
from lcx.core.batch import PADDING, Index
from lcx.core.config import fingerprint
from lcx.core.errors import UserError
from lcx.core.trees import Tree
from lcx.model.config import Architecture
from lcx.model.loss import logits
from lcx.model.transformer import KindContext, cast_params, embed, layers, rms_norm
from lcx.positions.form import Form, Piece
from lcx.positions.rotary import rotate, tables


@flax.struct.dataclass
class Cache:
    """Keys and values `[L, B, S, K, H]` with the index of every slot; empty slots are padding.

    `rotated` says whether keys are stored rotated (schemes of one piece) or raw (schemes of several, which rotate them anew for
    each piece). `scheme` is the fingerprint of forms and frequencies that the keys were made under.
    """

    keys: jax.Array
    values: jax.Array
    index: Index
    rotated: bool = flax.struct.field(pytree_node=False)
    scheme: str = flax.struct.field(pytree_node=False)


def empty_cache(arch: Architecture, arrays: Tree, rows: int, slots: int) -> Cache:
    """A cache for `rows` sequences of up to `slots` tokens."""
    config = arch.config
    shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    # A cache is donated, so every array is a buffer of its own.
    keys, values = (jnp.zeros(shape, jnp.dtype(config.compute_dtype)) for _ in range(2))
    order, positions, segments = (jnp.full((rows, slots), PADDING, jnp.int32) for _ in range(3))
    rotated = all(len(form.pieces) == 1 for _, form in arch.forms)
    return Cache(keys, values, Index(order, positions, segments), rotated, scheme_fingerprint(arch, arrays))


def scheme_fingerprint(arch: Architecture, arrays: Tree) -> str:
    """Changes with any frequency, piece or constant: keys cached under one fingerprint mean nothing under another."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return fingerprint([[jax.tree_util.keystr(path), np.asarray(leaf).tolist()] for path, leaf in leaves], repr(arch.forms))


def extend(params: Tree, arrays: Tree, arch: Architecture, cache: Cache, tokens: jax.Array, index: Index, start: int) -> tuple:
    """Run a chunk of tokens `[B, T]` that goes into slots `start … start + T`; gives (hidden `[B, T, D]`, cache).

    The cache is consumed. Tokens of segment `PADDING` are stored and never seen. Raises `UserError` when the slots do not exist
    or the cache was made under other frequencies.
    """
    slots = cache.keys.shape[2]
    if start + tokens.shape[1] > slots:
        raise UserError(f"tokens {start} to {start + tokens.shape[1]} do not fit a cache of {slots} slots; make it longer")
    if cache.scheme != scheme_fingerprint(arch, arrays):
        raise UserError("the cache was filled under other positional frequencies; prefill again under the present ones")
    return _extend(params, arrays, arch, cache, tokens, index, jnp.int32(start))


@functools.partial(jax.jit, static_argnames=("arch",), donate_argnames=("cache",))
def _extend(
    params: Tree, arrays: Tree, arch: Architecture, cache: Cache, tokens: jax.Array, index: Index, start: jax.Array
) -> tuple:
    params = cast_params(params, arch.config)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    slots = jax.tree.map(lambda old, new: write(old, new), cache.index, index)
    context = {kind: KindContext.build(arch, kind, params, arrays, index) for kind in arch.config.kinds}
    raw = {} if cache.rotated else {kind: tables(arch.form(kind), arrays[kind], slots.positions) for kind in arch.config.kinds}

    def cached(kind: str, layer: Tree, state: tuple, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
        here, spec = context[kind], arch.attention(kind)
        k_tables = raw.get(kind)
        if cache.rotated:
            k, form = rotate_keys(spec.form, k, here.tables)
            spec, k_tables = dataclasses.replace(spec, form=form), {}
        keys, values = write(state[0], k.astype(state[0].dtype)), write(state[1], v.astype(state[1].dtype))
        out = attend(
            spec, q, keys, values, index, slots,
            q_tables=here.tables, k_tables=k_tables, bias_params=here.bias, temperature=here.temperature,
            sinks=layer["attention"].get("sinks"),
        )  # fmt: skip
        return out, (keys, values)

    x = embed(params, arrays, arch, tokens, index.positions)
    x, (keys, values) = layers(params["layers"], x, arch.config, cached, (cache.keys, cache.values))
    return rms_norm(params["final_norm"], x, arch.config), cache.replace(keys=keys, values=values, index=slots)


def rotate_keys(form: Form, k: jax.Array, tables_: Tree) -> tuple[jax.Array, Form]:
    """Keys rotated for the only piece of `form`, and the form that attention over such keys takes."""
    (piece,) = form.pieces
    if piece.k_phase is None:
        return k, form
    return rotate(k, *tables_[piece.k_phase], form.layout), dataclasses.replace(
        form, pieces=(Piece(piece.q_phase, None, piece.band),)
    )


def generate(
    params: Tree, arrays: Tree, arch: Architecture, prompts: list[np.ndarray], max_new_tokens: int, *, chunk: int = 512,
) -> np.ndarray:  # fmt: skip
    """The most likely continuation of each prompt, int32 `[B, max_new_tokens]`.

    `prompts` are int arrays of any lengths ≥ 1; shorter ones are padded on the left, out of sight. `arrays` must be laid out for
    the longest prompt plus `max_new_tokens`. `chunk` tokens are prefilled at a time.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise UserError("every prompt needs at least one token")
    chunk = min(chunk, int(lengths.max()))
    width = -(-int(lengths.max()) // chunk) * chunk
    order = np.broadcast_to(np.arange(width, dtype=np.int32), (len(prompts), width))
    offset = (width - lengths)[:, None].astype(np.int32)
    tokens = np.stack([np.pad(np.asarray(p, np.int32), (width - len(p), 0)) for p in prompts])
    real = order >= offset
    index = Index(jnp.asarray(order), jnp.asarray(np.maximum(order - offset, 0)), jnp.asarray(real.astype(np.int32)))
    cache = empty_cache(arch, arrays, len(prompts), width + max_new_tokens)
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


@functools.partial(jax.jit, static_argnames=("arch",))
def _best(params: Tree, hidden: jax.Array, arch: Architecture) -> jax.Array:
    return jnp.argmax(logits(params, hidden, arch.config), axis=-1).astype(jnp.int32)
