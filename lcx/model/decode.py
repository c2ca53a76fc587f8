"""Generation with a key-value cache: chunked prefill, then blocks of single tokens, on one device or the current mesh.

Legend: B batch, T tokens of a chunk, S cache slots, K key-value heads, H head dim, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lcx.attention.attend import attend
from lcx.core.batch import Index
from lcx.core.errors import UserError
from lcx.core.mesh import context_size, target_platform
from lcx.core.numbers import round_up
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture
from lcx.model.cache import (
    Cache,
    check_chunk,
    check_room,
    collect,
    deal,
    empty_cache,
    keep_placed,
    layer_of,
    on_device_of,
    repeat_row,
    scheme_fingerprint,
    slots_of,
    write_index,
    write_layer,
)
from lcx.model.linear import turned
from lcx.model.loss import logits
from lcx.model.norm import rms_norm
from lcx.model.params import layer_specs
from lcx.model.sampling import GREEDY, Sampling, SamplingSpec, draw
from lcx.model.transformer import LayerInputs, cast_params, embed, scan_layers, unrolled_layers, unstack
from lcx.positions.rotary import rotate, tables
from lcx.positions.scheme import Region, SchemeSpec

CHUNK = 512
"""Default number of tokens that are prefilled at a time."""

BLOCK = 8
"""Number of tokens per row that are decoded between two checks by the host."""

OnToken = Callable[[int, Mapping[int, int]], Iterable[int] | None]
"""`(step, {row: token})`: called with the new token of every unfinished row; rows that it returns end with that token."""


@dataclasses.dataclass(frozen=True)
class Timings:
    """Tokens of all rows, and wall-clock seconds; the first new token of a row counts towards the prefill.

    Time for compiling, and for preparing weights and cache, is separate.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    setup_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after each row's first; None if there were none."""
        later = self.new_tokens - self.rows
        return later / self.decode_seconds if later else None


def extend(params: Tree, buffers: Tree, arch: Architecture, cache: Cache, tokens: jax.Array, index: Index, start: int) -> tuple:
    """Run a chunk of tokens `[B, T]`, numbers `start … start + T` of their rows; returns (hidden `[B, T, D]`, cache).

    On a mesh whose context has n devices (`jax.set_mesh`), T must be a multiple of n or at most n. Chunks must be consecutive, and
    the cache is consumed. Tokens of segment `PADDING` are stored but never seen; keys marked by `index.is_prefix` are seen by their
    own chunk and later ones. Raises `UserError` if there are not enough slots, the chunk cannot be distributed or the cache was
    filled under other frequencies.
    """
    check_room(arch, cache, tokens.shape[1], start)
    if cache.scheme != scheme_fingerprint(arch, buffers):
        raise UserError("the cache was filled with other positional frequencies; prefill again with the current ones")
    # Tokens that all devices compute are not distributed: every decoding step is the same program, whichever device stores it.
    turn = 0 if tokens.shape[1] % context_size() else start % context_size()
    return _extend(params, buffers, arch, cache, tokens, index, jnp.int32(start), turn)


@functools.partial(jax.jit, static_argnames=("arch", "turn"), donate_argnames=("cache",))
def _extend(
    params: Tree, buffers: Tree, arch: Architecture, cache: Cache, tokens: jax.Array, index: Index, start: jax.Array, turn: int
) -> tuple:
    """`turn`: the device that stores token `start`."""
    params = cast_params(params, arch)
    tokens, index = deal((tokens, index), turn)
    slots = {kind: write_index(old, index, start) for kind, old in cache.index.items()}
    inputs = {kind: LayerInputs.build(arch, kind, params, buffers, index) for kind in slots}
    raw = {kind: tables(arch.scheme(kind), buffers[kind], at.positions) for kind, at in slots.items() if kind not in cache.rotated}

    def cached_attention(
        kind: str, nth: jax.Array | int, layer: Tree, state: tuple, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple:
        here, spec = inputs[kind], arch.attention(kind)
        if kind in cache.rotated:
            k, scheme = rotate_keys(spec.scheme, k, here.tables)
            spec = dataclasses.replace(spec, scheme=scheme)
        state = tuple({**old, kind: write_layer(old[kind], new, nth, start)} for old, new in zip(state, (k, v), strict=True))
        keys, values = (layer_of(x[kind], nth, arch.config.num_kv_heads) for x in state)
        out = attend(
            spec, q, keys, values, index, slots[kind],
            q_tables=here.tables, k_tables=raw.get(kind, {}), bias_params=here.bias, query_scale=here.query_scale,
            sinks=layer["attention"].get("sinks"), cached=True,
        )  # fmt: skip
        return out, state

    x = embed(params, buffers, arch, tokens, index.positions)
    if isinstance(params["layers"], tuple):
        x, (keys, values) = unrolled_layers(params["layers"], x, arch, cached_attention, (cache.keys, cache.values))
    else:
        x, (keys, values), _ = scan_layers(params["layers"], x, arch, cached_attention, (cache.keys, cache.values))
    hidden = collect(rms_norm(params["final_norm"], x, arch.config), turn)
    return hidden, keep_placed(dataclasses.replace(cache, keys=keys, values=values, index=slots))


def rotate_keys(scheme: SchemeSpec, k: jax.Array, tables_: Tree) -> tuple[jax.Array, SchemeSpec]:
    """Keys rotated for the only region of `scheme`, and the scheme to use for attention over such keys."""
    (region,) = scheme.regions
    if region.k_rotation is None:
        return k, scheme
    cos, sin = tables_[region.k_rotation]
    rotated = dataclasses.replace(scheme, regions=(Region(region.q_rotation, None, region.band),))
    return rotate(k, cos, sin, scheme.layout), rotated


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What prompts begin with, prefilled once: `tokens` int32 `[P]`, and a `cache` of one row that has `used` slots in use."""

    tokens: np.ndarray
    cache: Cache
    used: int


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A batch of prompts, left-padded to whole chunks: tokens `[B, W]`, their index, the padding `[B, 1]` of each.

    They go into the slots behind `used` ones, whose tokens they continue; `offset` is what a slot's number exceeds the position of
    its token by.
    """

    tokens: np.ndarray
    index: Index
    padding: np.ndarray
    chunk: int
    used: int
    offset: np.ndarray

    @property
    def end(self) -> int:
        return self.used + self.tokens.shape[1]


def prefill(params: Tree, buffers: Tree, arch: Architecture, tokens: np.ndarray, *, slots: int, chunk: int | None = None) -> Prefix:
    """Tokens `[P]` for `generate` to continue, any number of times, by prompts that begin with them.

    The `slots` must hold them in whole chunks and whatever follows; padding included, that may come in chunks of up to `chunk`.
    """
    rows = _side_by_side([tokens], chunk, equal=False)
    stacked = target_platform() != "cpu"
    # Behind the prefix, a window's slots hold up to a chunk of padding as well.
    cache, prepared = empty_cache(arch, buffers, 1, slots, 2 * rows.chunk, stacked), prepare(params, arch, stacked)
    _, cache = _fill(prepared, buffers, arch, on_device_of(cache, prepared), rows, _Clock(False))
    return Prefix(np.asarray(tokens, np.int32), cache, rows.end)


def generate(
    params: Tree,
    buffers: Tree,
    arch: Architecture,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    chunk: int | None = None,
    slots: int | None = None,
    prefix: Prefix | None = None,
    on_token: OnToken | None = None,
    report: Callable[[Timings], None] | None = None,
) -> list[np.ndarray]:
    """A continuation of each prompt, int32 `[at most max_new_tokens]`; a row ends with the first of `stop_ids`.

    `prompts` are int arrays of any lengths >= 1; shorter ones are padded on the left, invisibly. `buffers` must be built for the
    longest prompt plus `max_new_tokens`. At most `chunk` tokens are prefilled at a time (None: 512, rounded up to the context).
    With `slots` for the cache (None: as many as are needed), programs depend on them, `chunk` and the number of prompts alone, so
    that calls with prompts of any length share them; rows are then padded to whole chunks. A `prefix` from `prefill`, with which
    all prompts begin, is not computed again; its slots are copied for each of them.

    `on_token` is called for every new token, `BLOCK` steps at a time, and may end rows; neither that nor the rest of the batch
    changes what a row draws. `report` is called once, at the end.

    On a mesh (`jax.set_mesh`, with weights placed on it as in training) rows are split over its batch axes if their number is
    divisible, and tokens and cache over its context (`model.cache`), by whose size `chunk` must be divisible. Raises `UserError`
    if a size does not fit.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    given = np.zeros(0, np.int32) if prefix is None else prefix.tokens
    if not all(np.array_equal(prompt[: len(given)], given) for prompt in prompts):
        raise UserError(f"every prompt must begin with the {len(given):,} tokens of the prefix")
    slots = slots if prefix is None else prefix.cache.slots
    rests = [prompt[len(given) :] for prompt in prompts]
    rows = _side_by_side(rests, chunk, slots is None, len(given), 0 if prefix is None else prefix.used)
    clock, needed = _Clock(report is not None), rows.end + max_new_tokens
    if slots is not None and needed > slots:
        raise UserError(f"slots={slots:,} must be at least {needed:,}, for prompts in whole chunks of {rows.chunk} and new tokens")
    stacked = target_platform() != "cpu"
    prepared = prepare(params, arch, stacked)
    if prefix is None:
        cache = on_device_of(empty_cache(arch, buffers, len(prompts), slots or needed, rows.chunk, stacked), prepared)
    else:
        _check_windows(arch, prefix.cache, rows)
        cache = repeat_row(prefix.cache, len(prompts))
    clock.begin(prepared, cache)
    chosen = (sampling.numbers, sampling.spec)
    hidden, cache = _fill(prepared, buffers, arch, cache, rows, clock)
    token = clock.run(first_token, prepared, hidden, arch, *chosen)
    collected = _Collected(len(prompts), stop_ids, on_token)
    collected.add(np.asarray(token)[:, None])
    clock.lap()
    stops = np.asarray(stop_ids or (-1,), np.int32)
    while (left := max_new_tokens - collected.steps) > 0 and collected.live:
        step = collected.steps
        out, count, token, cache = clock.run(
            decode_block, prepared, buffers, arch, cache, token, collected.ended, stops, rows.offset, np.int32(rows.end + step - 1),
            np.int32(step), np.int32(min(left, BLOCK)), *chosen,
        )  # fmt: skip
        collected.add(np.asarray(out)[:, : int(count)])
    clock.lap()
    if report is not None:
        new = sum(map(len, collected.tokens))
        report(Timings(len(prompts), sum(map(len, prompts)), new, clock.laps[0], clock.laps[1], clock.setup))
    return [np.asarray(row, np.int32) for row in collected.tokens]


def _fill(params: Tree, buffers: Tree, arch: Architecture, cache: Cache, rows: _Rows, clock: _Clock) -> tuple[jax.Array, Cache]:
    """The hidden states of the last chunk, and the cache with all chunks."""
    for start in range(0, rows.tokens.shape[1], rows.chunk):
        part = jnp.asarray(rows.tokens[:, start : start + rows.chunk])
        at = rows.index.slice(start, rows.chunk)
        hidden, cache = clock.run(_extend, params, buffers, arch, cache, part, at, jnp.int32(rows.used + start), 0)
    return hidden, cache


def _check_windows(arch: Architecture, cache: Cache, rows: _Rows) -> None:
    """Raises `UserError` where padding behind a prefix would push tokens out of the slots of a window that still sees them."""
    padding = int(rows.padding.max())
    for kind, index in cache.index.items():
        if index.order.shape[1] < slots_of(arch, kind, cache.slots, rows.chunk + padding):
            raise UserError(f"prompts differ by {padding} tokens behind their prefix; prefill it with chunk={rows.chunk + padding}")


def _side_by_side(prompts: Sequence[np.ndarray], chunk: int | None, equal: bool, position: int = 0, used: int = 0) -> _Rows:
    """Prompts from a `position` on with padding on their left; with `equal`, chunks are made smaller as long as their number stays
    the same."""
    lengths = np.array([len(prompt) for prompt in prompts])
    if not len(lengths) or lengths.min() < 1:
        raise UserError(f"every prompt must have at least one token{' behind the prefix' if position else ''}")
    size, longest = context_size(), int(lengths.max())
    if chunk is None:
        chunk = round_up(CHUNK, size)
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1")
    check_chunk("a chunk", chunk)
    if equal:
        # Anything beyond the longest prompt is wasted work.
        smaller = -(-longest // -(-longest // chunk))
        # Tiles of queries without padding need no mask where they see everything.
        chunk = min(chunk, round_up(smaller, 16)) if smaller >= 256 else smaller
    chunk = chunk if chunk <= size else round_up(chunk, size)
    width = round_up(longest, chunk)
    padding = (width - lengths)[:, None].astype(np.int32)
    tokens = np.stack([np.pad(np.asarray(p, np.int32), (width - len(p), 0)) for p in prompts])
    number = np.arange(width, dtype=np.int32) - padding
    # Padding may stand between a prefix and what follows it, so that windows count positions and not slots.
    positions = jnp.asarray(np.maximum(number, 0) + np.int32(position))
    index = Index(positions, positions, jnp.asarray((number >= 0).astype(np.int32)))
    return _Rows(tokens, index, padding, chunk, used, padding + np.int32(used - position))


class _Collected:
    """Collects the tokens of each row until it ends."""

    def __init__(self, rows: int, stop_ids: Sequence[int], on_token: OnToken | None):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.ended, self.steps = np.zeros(rows, bool), 0
        self._stop_ids, self._on_token = stop_ids, on_token

    @property
    def live(self) -> bool:
        return not self.ended.all()

    def add(self, block: np.ndarray) -> None:
        """Adds tokens `[B, steps]`; those after the end of a row are dropped."""
        for column in block.T:
            if not self.live:
                return
            new = {row: int(token) for row, token in enumerate(column) if not self.ended[row]}
            for row, token in new.items():
                self.tokens[row].append(token)
                self.ended[row] = token in self._stop_ids
            if self._on_token is not None:
                for row in self._on_token(self.steps, new) or ():
                    self.ended[row] = True
            self.steps += 1


class _Clock:
    """Times consecutive parts, and separately their setup if timings are wanted."""

    def __init__(self, wanted: bool):
        self._wanted, self._since = wanted, time.perf_counter()
        self._compiled: set[Callable] = set()
        self.setup, self.laps = 0.0, []

    def begin(self, *awaited: Tree) -> None:
        """Ends the setup: all time before this call counts as such."""
        if self._wanted:
            jax.block_until_ready(awaited)
            self.lap()
            self.setup = self.laps.pop()

    def run(self, step: Callable, *args) -> tuple | jax.Array:
        """Runs `step(*args)`; the shapes of a function's arguments must be the same in each call."""
        if self._wanted and step not in self._compiled:
            jax.block_until_ready(args)
            start = time.perf_counter()
            # The call below finds what is compiled here.
            step.lower(*args).compile()
            self._compiled.add(step)
            seconds = time.perf_counter() - start
            self.setup += seconds
            self._since += seconds
        return step(*args)

    def lap(self) -> None:
        """The seconds since the last lap."""
        now = time.perf_counter()
        self.laps.append(now - self._since)
        self._since = now


@functools.partial(jax.jit, static_argnames=("arch", "stacked"))
def prepare(params: Tree, arch: Architecture, stacked: bool) -> Tree:
    """Weights as every step needs them: in the compute dtype, and on a CPU one array per layer, in the faster order."""
    params = cast_params(params, arch)
    if stacked:
        return params
    params = unstack(params)
    if arch.execution.compute_dtype == "bfloat16" and target_platform() == "cpu":
        table = layer_specs(arch.config)
        params["layers"] = tuple(turned(layer, table) for layer in params["layers"])
    return params


@functools.partial(jax.jit, static_argnames=("arch", "sampling"))
def first_token(params: Tree, hidden: jax.Array, arch: Architecture, numbers: Tree, sampling: SamplingSpec) -> jax.Array:
    """The first new token of each row, int32 `[B]`, from the last of the hidden states `[B, T, D]` of its prompt."""
    return _next(params, hidden, arch, numbers, sampling, 0)


def _next(
    params: Tree, hidden: jax.Array, arch: Architecture, numbers: Tree, sampling: SamplingSpec, step: jax.Array | int
) -> jax.Array:
    """On every device of every host, since all of them continue from it."""
    return _everywhere(draw(logits(params, hidden[:, -1], arch.config), sampling, numbers, step))


def _everywhere(x: jax.Array) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


@functools.partial(jax.jit, static_argnames=("arch", "sampling"), donate_argnames=("cache",))
def decode_block(
    params: Tree, buffers: Tree, arch: Architecture, cache: Cache, token: jax.Array, ended: jax.Array, stop_ids: jax.Array,
    offset: jax.Array, number: jax.Array, step: jax.Array, limit: jax.Array, numbers: Tree, sampling: SamplingSpec,
) -> tuple:  # fmt: skip
    """Up to `limit` tokens after `token` `[B]`, which is number `number` of its row; fewer if all rows have ended.

    `step` tokens of each row were drawn before. Returns (tokens `[B, BLOCK]`, how many of them, the last, cache).
    """

    def turn(carry: tuple) -> tuple:
        i, token, ended, out, cache = carry
        at = jnp.full(offset.shape, number + i, jnp.int32) - offset
        here = Index(at, at, jnp.ones_like(at))
        hidden, cache = _extend(params, buffers, arch, cache, token[:, None], here, number + i, 0)
        token = _next(params, hidden, arch, numbers, sampling, step + i)
        ended = ended | jnp.any(token[:, None] == stop_ids[None], axis=1)
        return i + 1, token, ended, jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1), cache

    def more(carry: tuple) -> jax.Array:
        i, _, ended, _, _ = carry
        return (i < limit) & ~jnp.all(ended)

    out = jnp.zeros((len(token), BLOCK), jnp.int32)
    i, token, _, out, cache = jax.lax.while_loop(more, turn, (jnp.int32(0), token, ended, out, cache))
    return _everywhere(out), i, token, cache
