"""One row whose cache stays between answers: of a conversation that goes on, only what is new is computed.

A row's token number n is in slot n (of a window's ring, in slot n modulo its size), so that going back takes nothing but writing
over what is there: a slot that is not overwritten yet holds a token of higher order, which a causal mask hides. Prompts are padded
on the right to whole chunks of two sizes, and what follows overwrites the padding. So answers of any length share their programs.

Legend: B batch (one row), T tokens of a chunk, S cache slots, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.batch import Index
from lcx.core.errors import UserError
from lcx.core.mesh import target_platform
from lcx.core.numbers import round_up
from lcx.core.trees import Tree
from lcx.model.architecture import Architecture
from lcx.model.cache import Cache, empty_cache, on_device_of
from lcx.model.decode import BLOCK, CHUNK, decode_block, extend, first_token, prepare
from lcx.model.sampling import GREEDY, Sampling

SMALL_CHUNK = 64
"""Number of tokens that are read at a time where fewer than `CHUNK` are left."""

FEWEST_SLOTS = 1024
"""Slots of a new cache; it doubles whenever it is full."""

OnRead = Callable[[int, int], None]
"""`(read, total)`: how many of a prompt's tokens are in the cache by now."""


class Session:
    """Answers on one device, each to a row that begins like the one before it as far as it does.

    `length` is what `buffers` are built for: no row with its answer may be longer. Not for several threads at a time.
    """

    def __init__(self, params: Tree, buffers: Tree, arch: Architecture, length: int) -> None:
        self._stacked = target_platform() != "cpu"
        self._params = prepare(params, arch, self._stacked)
        self._buffers, self._arch, self._length = buffers, arch, length
        self._cache: Cache | None = None
        self._reached = 0
        self.tokens = np.zeros(0, np.int32)
        """Those whose keys are in the cache, int32 `[n]`."""

    def answer(
        self,
        tokens: np.ndarray,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[int], bool] | None = None,
        on_read: OnRead | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """What follows `tokens` `[n]`, int32 `[at most max_new_tokens]`, to the first of `stop_ids`, which counts.

        `on_token` hears of each new token and ends the answer by returning true. `on_read` is called before and after each chunk of
        the prompt. `is_stopped` is asked between chunks, and between blocks of `BLOCK` tokens: what has come by then is returned.
        Raises `UserError` if prompt and answer together are longer than the session's length.
        """
        if not len(tokens):
            raise UserError("a prompt must have at least one token")
        if max_new_tokens < 1 or len(tokens) + max_new_tokens > self._length:
            raise UserError(f"{len(tokens):,} tokens and {max_new_tokens:,} new ones must fit into {self._length:,}")
        tokens = np.asarray(tokens, np.int32)
        self._keep_common(tokens)
        self._make_room(len(tokens) + max_new_tokens)
        hidden = self._read(tokens, on_read, is_stopped)
        if hidden is None:
            return np.zeros(0, np.int32)
        new: list[int] = []
        for token in self._drawn(hidden, len(tokens), max_new_tokens, sampling, stop_ids, is_stopped):
            # The key of a token is computed when the next one is drawn.
            self.tokens = np.append(tokens, np.asarray(new, np.int32))
            new.append(token)
            if (on_token is not None and on_token(token)) or token in stop_ids:
                break
        return np.asarray(new, np.int32)

    def _keep_common(self, tokens: np.ndarray) -> None:
        """Go back to what the cache has in common with `tokens`; at least one of these is left to be read."""
        if self._cache is None:
            self.tokens, self._reached = self.tokens[:0], 0
        count = min(len(self.tokens), len(tokens) - 1)
        differ = np.flatnonzero(self.tokens[:count] != tokens[:count])
        kept = int(differ[0]) if len(differ) else count
        masks = [self._arch.attention(kind).mask for kind in self._arch.config.kinds]
        if kept < self._reached and any(mask.prefix or not mask.causal for mask in masks):
            # Here a slot that is not overwritten would be seen.
            self._cache, kept = None, 0
        elif self._cache is not None:
            for kind, index in self._cache.index.items():
                held, window = index.order.shape[1], self._arch.attention(kind).mask.window
                if window is not None and self._reached > held and kept - window + 1 < self._reached - held:
                    kept = 0
        self.tokens, self._reached = self.tokens[:kept], self._reached if kept else 0

    def _make_room(self, tokens: int) -> None:
        """A cache with slots for `tokens` and the padding of the last chunk, with what is in it by now."""
        needed, slots = tokens + SMALL_CHUNK, FEWEST_SLOTS
        while slots < needed:
            slots *= 2
        slots = min(slots, round_up(self._length + SMALL_CHUNK, SMALL_CHUNK))
        cache = self._cache
        if cache is not None and cache.slots >= needed:
            return
        fresh = on_device_of(empty_cache(self._arch, self._buffers, 1, slots, CHUNK, self._stacked), self._params)
        if cache is None:
            self._cache, self._reached = fresh, 0
            return
        old, new = ((x.keys, x.values, x.index) for x in (cache, fresh))
        keys, values, index = _copied(new, old)
        self._cache = dataclasses.replace(fresh, keys=keys, values=values, index=index)

    def _read(self, tokens: np.ndarray, on_read: OnRead | None, is_stopped: Callable[[], bool]) -> jax.Array | None:
        """Hidden state `[1, 1, D]` of the last token, once the cache holds all of them; None if stopped before."""
        hidden, total = None, len(tokens)
        for start, width in _chunks(len(self.tokens), total):
            if on_read is not None:
                on_read(start, total)
            if is_stopped():
                return None
            count = min(width, total - start)
            place = jnp.arange(start, start + width, dtype=jnp.int32)[None]
            index = Index(place, place, jnp.asarray(np.arange(width)[None] < count, jnp.int32))
            part = jnp.asarray(np.pad(tokens[start : start + count], (0, width - count))[None])
            hidden, cache = extend(self._params, self._buffers, self._arch, self._take(), part, index, start)
            self._put(cache, start + width)
            hidden = _at(hidden, jnp.int32(count - 1))
            self.tokens = tokens[: start + count]
        if on_read is not None:
            on_read(total, total)
        return hidden

    def _drawn(
        self, hidden: jax.Array, begun: int, count: int, sampling: Sampling, stop_ids: Sequence[int], is_stopped: Callable[[], bool]
    ) -> Iterator[int]:
        """Up to `count` tokens behind the `begun` ones that the cache holds."""
        chosen, given = (sampling.numbers, sampling.spec), 1
        stops, offset = np.asarray(tuple(stop_ids) or (-1,), np.int32), np.zeros((1, 1), np.int32)
        token = first_token(self._params, hidden, self._arch, *chosen)
        yield int(token[0])
        while given < count and not is_stopped():
            out, found, token, cache = decode_block(
                self._params, self._buffers, self._arch, self._take(), token, np.zeros(1, bool), stops, offset,
                np.int32(begun + given - 1), np.int32(given), np.int32(min(count - given, BLOCK)), *chosen,
            )  # fmt: skip
            self._put(cache, begun + given - 1 + int(found))
            yield from np.asarray(out)[0, : int(found)].tolist()
            given += int(found)

    def _take(self) -> Cache:
        """The cache, for a step that consumes it; if that step is interrupted, there is none any more."""
        cache, self._cache = self._cache, None
        assert cache is not None
        return cache

    def _put(self, cache: Cache, reached: int) -> None:
        self._cache, self._reached = cache, max(self._reached, reached)


def _chunks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where each chunk begins, and its width; the last one may go beyond the end."""
    while start < end:
        width = CHUNK if end - start >= CHUNK else SMALL_CHUNK
        yield start, width
        start += width


@jax.jit
def _at(hidden: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(hidden, place, 1, axis=1)


@functools.partial(jax.jit, donate_argnums=0)
def _copied(new: Tree, old: Tree) -> Tree:
    """The slots of `old` at the beginning of those of `new`; a window's ring that has its full size keeps it."""
    return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim), new, old)
