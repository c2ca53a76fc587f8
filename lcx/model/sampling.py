"""From logits to the next token: greedy, temperature, top-k, top-p.

Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.errors import UserError
from lcx.core.trees import Tree


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """The static part of a `Sampling`: everything that a compiled program depends on."""

    greedy: bool
    top_k: int | None
    nucleus: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is the most likely one.

    Logits are divided by `temperature` (0: the most likely token, whatever else is set), then all below the `top_k` largest are
    excluded (None: none), then the least likely whose probabilities add up to at most 1 - `top_p`. Same as the processors of
    transformers in that order; among equally likely tokens at the border of `top_p` the same number is kept, those with higher
    ids. Raises `UserError` for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature!r} must be a number of at least 0; 0 picks the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1; omit it to draw from all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p!r} must be above 0 and at most 1; 1 excludes nothing")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be from 0 to {2**32 - 1}")

    @property
    def spec(self) -> SamplingSpec:
        """The part for which a program is compiled; other temperatures, probabilities and seeds do not recompile."""
        greedy = self.temperature == 0
        return SamplingSpec(greedy, None if greedy else self.top_k, not greedy and self.top_p < 1)

    @property
    def numbers(self) -> Tree:
        """The remaining settings as scalars."""
        return {
            "temperature": np.float32(self.temperature or 1.0),
            "top_p": np.float32(self.top_p),
            "seed": np.uint32(self.seed),
        }


GREEDY = Sampling()


def draw(logits_BV: jax.Array, spec: SamplingSpec, numbers: Tree, step: jax.Array | int) -> jax.Array:
    """The next token of each row, int32 `[B]`, from float32 logits; for use inside `jax.jit`.

    The noise depends only on the seed, the row's number and `step` (tokens drawn before), not on the other rows or the mesh.
    """
    if spec.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Another default generator may draw differently under vmap.
    key = jax.random.key(numbers["seed"], impl="threefry2x32")

    def noise(row: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, row), step), logits_BV.shape[1:], jnp.float32)

    rows = jax.vmap(noise)(jnp.arange(logits_BV.shape[0], dtype=jnp.uint32))
    return jnp.argmax(warp(logits_BV, spec, numbers) + rows, axis=-1).astype(jnp.int32)


def warp(logits_BV: jax.Array, spec: SamplingSpec, numbers: Tree) -> jax.Array:
    """The float32 logits `[B, V]` to draw from: divided by the temperature, minus infinity for excluded tokens."""
    x = logits_BV.astype(jnp.float32) / numbers["temperature"]
    if (top_k := spec.top_k) is not None and top_k < x.shape[-1]:
        ranks = _ranks(x)
        least = _largest(lambda rank: _count(ranks >= rank) >= top_k, len(x))
        x = jnp.where(ranks < least, -jnp.inf, x)
    return _nucleus(x, numbers["top_p"]) if spec.nucleus else x


def _nucleus(x: jax.Array, top_p: jax.Array) -> jax.Array:
    """Excludes tokens outside `top_p`; among equal ones at the border those with lower ids go first, as in a stable sort."""
    ranks, p, most = _ranks(x), jax.nn.softmax(x, axis=-1), 1 - top_p

    def below(rank: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ranks < rank, p, 0.0), axis=-1, keepdims=True)

    # Of a tiny top_p float32 leaves 1 - top_p = 1, below which there is everything.
    border = jnp.minimum(_largest(lambda rank: below(rank) <= most, len(x)), jnp.max(ranks, axis=-1, keepdims=True))
    equal = ranks == border
    nth = jnp.cumsum(equal, axis=-1)
    goes = equal & (below(border) + nth * p <= most) & (nth < _count(equal))
    return jnp.where((ranks < border) | goes, -jnp.inf, x)


def _ranks(x: jax.Array) -> jax.Array:
    """uint32 numbers in the same order as the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # without minus zero, which is not less than zero
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest rank, uint32 `[B, 1]`, for which `holds` is true, as it is for all smaller ones; found bit by bit.

    Thirty-two passes over the vocabulary: a sort takes fifty times longer on a CPU.
    """

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(tried), tried, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((rows, 1), jnp.uint32))


def _count(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.int32)
