"""The key-value cache: slots shared by the devices of a context, as many as each kind of layer needs.

Distribution over devices: a row's tokens are counted from 0, padding included. With n devices sharing the sequence, token s goes to
device s % n, into its slot s // n. So whatever the chunks, every device has its share of each chunk, of each window and of the
decoded tokens, which go round in turn. A chunk arrives distributed in the same way (`deal`): each device writes its own tokens into
its own slots, and none travels. Masks compare `order`, which is stored with the slots, never a slot's number.

Layers with a window of w tokens, visited by chunks of at most T, keep w - 1 + T slots (rounded up to the devices) as a ring buffer:
token s overwrites token s - slots, which by then has left the window of every query to come, including the chunk's first. That
requires a row's `order` to increase by at least one per token, as it does where both are the place in the row. A mask with a
prefix sees marked keys beyond any window, so its layers keep all slots.

Legend: B batch, T tokens of a chunk, S slots, K key-value heads, H head dim, L layers of a kind, n devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import NamedSharding, PartitionSpec

from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.core.batch import PADDING, Index
from lcx.core.configs import fingerprint
from lcx.core.errors import UserError
from lcx.core.mesh import SEQUENCE, context_size, fitting_spec, multiples, target_platform
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture

Layers = jax.Array | tuple[jax.Array, ...]
"""A value for every layer of a kind, stacked or as a tuple with one per layer."""


@flax.struct.dataclass
class Cache:
    """By layer kind: keys and values `[L, B, S, K, H]` in the compute dtype, with the index `[B, S]` of every slot.

    For parameters with one tree per layer (`transformer.unstack`), keys and values are tuples of L arrays `[B, S, K·H]`. Empty
    slots are padding. `slots` is the number of tokens of a row that fit, `context` the number of devices that share them. `rotated`
    names the kinds whose keys are stored rotated (schemes with one region); those of other kinds are stored unrotated and rotated
    for each region. `scheme` is the fingerprint of the schemes and frequencies under which the keys were computed.
    """

    keys: dict[str, Layers]
    values: dict[str, Layers]
    index: dict[str, Index]
    slots: int = flax.struct.field(pytree_node=False)
    context: int = flax.struct.field(pytree_node=False)
    rotated: tuple[str, ...] = flax.struct.field(pytree_node=False)
    scheme: str = flax.struct.field(pytree_node=False)


def slots_of(arch: Architecture, kind: str, slots: int, chunk: int) -> int:
    """Slots that layers of a kind need for rows of `slots` tokens that arrive in chunks of at most `chunk`."""
    mask, size = arch.attention(kind).mask, context_size()
    window = mask.window if mask.causal and not mask.prefix else None
    needed = slots if window is None else min(slots, window - 1 + chunk)
    return -(-needed // size) * size


def empty_cache(arch: Architecture, buffers: Tree, rows: int, slots: int, chunk: int | None = None, stacked: bool = True) -> Cache:
    """A cache for `rows` sequences of up to `slots` tokens, created in place on the current mesh.

    `chunk` is the largest number of tokens added at a time (None: any number); the smaller, the fewer slots a window takes.
    `stacked` says whether the layers of the parameters are stacked; those of the cache must match. Raises `UserError` for a
    cache larger than the host's memory if its CPU computes.
    """
    config, counted = arch.config, arch.config.layer_kinds.count

    def shape(kind: str) -> tuple[int, ...]:
        return counted(kind), rows, slots_of(arch, kind, slots, chunk or slots), config.num_kv_heads, config.head_dim

    dtype = jnp.dtype(arch.execution.compute_dtype)
    size = sum(2 * math.prod(shape(kind)) * dtype.itemsize for kind in config.kinds)
    if target_platform() == "cpu" and size > (memory := psutil.virtual_memory().total):
        raise UserError(
            f"a cache of {slots:,} tokens for each of {rows} prompts needs {size / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f} GB; lower max_new_tokens, or give fewer prompts at a time"
        )

    # A cache is donated, so every array needs its own buffer.
    def heads() -> dict[str, Layers]:
        if stacked:
            return {kind: _full(_HEADS, shape(kind), 0, dtype) for kind in config.kinds}
        flat = {kind: (*shape(kind)[1:3], config.num_kv_heads * config.head_dim) for kind in config.kinds}
        return {kind: tuple(_full(_FLAT, flat[kind], 0, dtype) for _ in range(counted(kind))) for kind in config.kinds}

    def index(kind: str) -> Index:
        def one() -> jax.Array:
            return _full(_SLOTS, shape(kind)[1:3], PADDING, jnp.int32)

        return Index(one(), one(), one(), one() if arch.attention(kind).mask.prefix else None)

    rotated = tuple(kind for kind, scheme in arch.schemes if len(scheme.regions) == 1)
    indices = {kind: index(kind) for kind in config.kinds}
    return Cache(heads(), heads(), indices, slots, context_size(), rotated, scheme_fingerprint(arch, buffers))


_HEADS = (None, "batch", "sequence", "kv_heads", None)
_FLAT = ("batch", "sequence", "kv_heads")
_SLOTS = ("batch", "sequence")


def _full(axes: tuple[str | None, ...], shape: tuple[int, ...], value: int, dtype: Any) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.full(shape, value, dtype)
    mesh = jax.sharding.get_mesh()
    return jnp.full(shape, value, dtype, device=NamedSharding(mesh, fitting_spec(axes, shape, mesh)))


def on_device_of(cache: Cache, params: Tree) -> Cache:
    """The cache committed to the device that the weights are committed to, if they are to one.

    After a step it is so anyway; if it were not before, the first step would be compiled apart from all others.
    """
    leaf = jax.tree.leaves(params)[0]
    return jax.device_put(cache, leaf.sharding) if leaf.committed and leaf.sharding.num_devices == 1 else cache


def keep_placed(cache: Cache) -> Cache:
    """The cache constrained to the placement that `empty_cache` gave it, so that a donated one is written in place."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache

    def pin(x: jax.Array) -> jax.Array:
        axes = next(axes for axes in (_HEADS, _FLAT, _SLOTS) if len(axes) == x.ndim)
        return jax.lax.with_sharding_constraint(x, fitting_spec(axes, x.shape, mesh))

    return jax.tree.map(pin, cache)


@functools.partial(jax.jit, static_argnames="rows")
def repeat_row(cache: Cache, rows: int) -> Cache:
    """The cache of one row, copied for as many."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, rows, axis=1 if x.ndim == len(_HEADS) else 0)

    return keep_placed(jax.tree.map(one, cache))


def scheme_fingerprint(arch: Architecture, buffers: Tree) -> str:
    """A fingerprint that changes with any frequency, region or constant: keys cached under one are invalid under another."""
    leaves = jax.tree_util.tree_leaves_with_path(buffers)
    return fingerprint([[jax.tree_util.keystr(path), np.asarray(leaf).tolist()] for path, leaf in leaves], repr(arch.schemes))


def check_room(arch: Architecture, cache: Cache, tokens: int, start: int) -> None:
    """Raises `UserError` if `tokens` tokens from number `start` on cannot be distributed, or have no slots in this cache."""
    if cache.context != context_size():
        raise UserError(f"the cache is for a context of {cache.context} devices, and the mesh has {context_size()}; prefill again")
    check_chunk("a chunk", tokens)
    if start + tokens > cache.slots:
        raise UserError(f"tokens {start} to {start + tokens} do not fit into a cache of {cache.slots} slots; create a longer one")
    for kind, index in cache.index.items():
        needed, held = slots_of(arch, kind, cache.slots, tokens), index.order.shape[1]
        if held < needed:
            raise UserError(
                f"a chunk of {tokens} tokens needs {needed} slots in {kind!r} layers, whose window of {arch.config.window} has "
                f"{held} in this cache; create it with chunk={tokens}"
            )


def check_chunk(what: str, tokens: int) -> None:
    """Raises `UserError` naming the nearest sizes if `tokens` tokens cannot be distributed over the devices of the context.

    Fewer tokens than devices (decoded ones) are computed by all of them.
    """
    size = context_size()
    if tokens > size and tokens % size:
        raise UserError(
            f"{what} of {tokens} tokens must be divisible by the {size} devices of the context; try {multiples(tokens, size)}"
        )


def deal(tree: Any, start: int) -> Any:
    """Arrays `[B, T, ...]` of tokens `start …` arranged so that a plain split along T gives each device those of its slots."""
    size = context_size()

    def one(x: jax.Array) -> jax.Array:
        return jnp.roll(arrange(x, "striped", size), start % size * (x.shape[1] // size), axis=1)

    return tree if size == 1 or _few(tree, size) else jax.tree.map(one, tree)


def collect(x: jax.Array, start: int) -> jax.Array:
    """The inverse of `deal`, for results `[B, T, ...]`."""
    size = context_size()
    if size == 1 or _few(x, size):
        return x
    return restore(jnp.roll(x, -(start % size) * (x.shape[1] // size), axis=1), "striped", size)


def _few(tree: Any, size: int) -> bool:
    return jax.tree.leaves(tree)[0].shape[1] % size != 0


def layer_of(layers: Layers, nth: jax.Array | int, heads: int) -> jax.Array:
    """The contents `[B, S, K, H]` of the `nth` layer of a kind with `heads` KV heads."""
    if isinstance(layers, tuple):
        return layers[nth].reshape(*layers[nth].shape[:2], heads, -1)
    return jax.lax.dynamic_index_in_dim(layers, nth, keepdims=False)


def write_layer(old: Layers, new: jax.Array, nth: jax.Array | int, start: jax.Array) -> Layers:
    """Like `write`, for layers that are stacked or in a tuple."""
    if not isinstance(old, tuple):
        return write(old, new, nth, start)
    flat, kept = new.reshape(*new.shape[:2], -1).astype(old[nth].dtype), old[nth]
    if kept.dtype == jnp.bfloat16:
        # As numbers XLA's CPU backend would update a copy of all slots in float32, for each token.
        flat, kept = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (flat, kept))
    # A loop of one iteration: otherwise XLA's CPU backend fuses the update into each of its readers, and copies all slots for each.
    once = jnp.minimum(start, 0) + 1
    written = jax.lax.fori_loop(0, once, lambda _, x: write(x[None], flat, 0, start)[0], kept)
    return (*old[:nth], jax.lax.bitcast_convert_type(written, old[nth].dtype), *old[nth + 1 :])


def write(old: jax.Array, new: jax.Array, layer: jax.Array | int, start: jax.Array) -> jax.Array:
    """Writes `new` `[B, T, ...]`, arranged by `deal`, as tokens `start …` of layer `layer` of `old` `[L, B, S, ...]`."""
    mesh, size = jax.sharding.get_abstract_mesh(), context_size()
    new = new.astype(old.dtype)
    if size == 1:
        return _put(old, new, layer, start, True)
    count = new.shape[1]
    spread = count % size == 0

    def run(old: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
        first = (jax.lax.axis_index(SEQUENCE) - start) % size
        if not spread:
            new = jax.lax.dynamic_slice_in_dim(new, jnp.minimum(first, count - 1), 1, axis=1)
        return _put(old, new, layer, (start + first) // size, spread | (first < count))

    slots, whole = PartitionSpec(None, None, SEQUENCE), PartitionSpec()
    tokens = PartitionSpec(None, SEQUENCE) if spread else whole
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(slots, tokens, whole, whole), out_specs=slots, axis_names=set(SEQUENCE), check_vma=False
    )
    return run(old, new, jnp.int32(layer), start)


def write_index(old: Index, new: Index, start: jax.Array) -> Index:
    """Like `write`, for the index of a kind's slots; without `new.is_prefix` no key is marked."""
    unmarked = jnp.zeros_like(new.order) if new.is_prefix is None else new.is_prefix
    new = dataclasses.replace(new, is_prefix=None if old.is_prefix is None else unmarked, layout=old.layout)
    return jax.tree.map(lambda old, new: write(old[None], new, 0, start)[0], old, new)


def _put(old: jax.Array, new: jax.Array, layer: jax.Array | int, at: jax.Array, mine: jax.Array | bool) -> jax.Array:
    """Writes `new` `[B, T, ...]` into slots `at …` of a layer of `old` `[L, B, S, ...]`, wrapping around at the end, if `mine` is
    true.

    Uses two plain updates, before the end and after it: a scatter would go token by token.
    """
    size, slots = new.shape[1], old.shape[2]
    at = at % slots

    def place(old: jax.Array, first: jax.Array | int, shift: jax.Array) -> jax.Array:
        """Token i into slot `first + shift + i`, if that is one of the T slots from `first` on."""
        where = (layer, 0, first, *(0,) * (old.ndim - 3))
        before = jax.lax.dynamic_slice(old, where, (1, *new.shape))
        token = jnp.arange(size, dtype=jnp.int32) - shift
        here = ((token >= 0) & (token < size) & mine).reshape(1, 1, size, *(1,) * (old.ndim - 3))
        turned = new if size == 1 else jnp.roll(new, shift, axis=1)
        return jax.lax.dynamic_update_slice(old, jnp.where(here, turned[None], before), where)

    start = jnp.minimum(at, slots - size)
    old = place(old, start, at - start)
    return old if size == 1 else place(old, 0, at - slots)
