"""Angles that are exact at every position: frequencies as 64-bit fixed-point turns.

A rotary frequency is stored as the fraction of a turn per position in 64 bits (two uint32 words). `position * turns` wraps around
by itself, as angles do; after subtracting the nearest quadrant only the rest is passed to float32 cos and sin. A float32 product
`position * frequency` would lose the angle long before 100K positions.

Legend: B batch, T tokens, R rotary pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import mpmath
import numpy as np

MpFloat = Any
"""An `mpmath.mpf`: mpmath makes that class at run time, so a type checker cannot take it as a type."""

DIGITS = 50
"""Decimal digits used to compute frequencies on the host."""

UNUSED = 2**32 - 1
"""Value of `PositionMap.modulo` and `PositionMap.clip` that leaves every int32 position unchanged."""


@flax.struct.dataclass
class PositionMap:
    """Positions as a rotation sees them: `min((p // divide) % modulo + offset, clip)`; uint32 scalars."""

    divide: Any
    modulo: Any
    offset: Any
    clip: Any

    def __call__(self, positions: jax.Array) -> jax.Array:
        """uint32 positions after the remap."""
        return jnp.minimum(positions // self.divide % self.modulo + self.offset, self.clip)


def position_map(*, divide: int = 1, modulo: int = UNUSED, offset: int = 0, clip: int = UNUSED) -> PositionMap:
    """A `PositionMap` of host arrays."""
    return PositionMap(*(np.asarray(value, np.uint32) for value in (divide, modulo, offset, clip)))


@flax.struct.dataclass
class Rotation:
    """How one side of attention is rotated. Every leaf is an array, so a compiled program depends only on the structure.

    `hi`, `lo`: uint32 `[R]`, turns per position. `amplitude`: float32 scalar that multiplies cos and sin. `position_map` remaps the
    positions first; `shift` (uint32 `[R]`, turns * 2**32) is added to the angle; `growth` (float32 `[R]`) and `center`
    (float32 scalar) multiply each pair by `exp(growth * (p - center))`. The last four are None if a scheme does not need them, and
    then cost nothing.
    """

    hi: Any
    lo: Any
    amplitude: Any
    position_map: PositionMap | None = None
    shift: Any = None
    growth: Any = None
    center: Any = None


def encode(frequencies: Iterable[MpFloat | float]) -> tuple[np.ndarray, np.ndarray]:
    """Radians per position as fixed-point turns: two uint32 `[R]`, the high and the low word of `turns * 2**64`."""
    with mpmath.workdps(DIGITS):
        words = [int(mpmath.nint(mpmath.mpf(f) / (2 * mpmath.pi) * 2**64)) % 2**64 for f in frequencies]
    return np.asarray([w >> 32 for w in words], np.uint32), np.asarray([w & 0xFFFFFFFF for w in words], np.uint32)


def decode(hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
    """Radians per position, float64 `[R]`, from the words that `encode` returns (frequencies below one turn per position)."""
    return (np.asarray(hi, np.float64) * 2.0**-32 + np.asarray(lo, np.float64) * 2.0**-64) * (2 * np.pi)


def rotation(frequencies: Iterable[MpFloat | float], amplitude: float = 1.0, **optional: Any) -> Rotation:
    """A `Rotation` of host arrays; `optional` sets the fields that are None by default."""
    hi, lo = encode(frequencies)
    return Rotation(hi=hi, lo=lo, amplitude=np.asarray(amplitude, np.float32), **optional)


def turns(hi_R: jax.Array, lo_R: jax.Array, positions: jax.Array) -> jax.Array:
    """Upper 32 bits of `positions * turns` mod one turn: uint32 `positions.shape + [R]`; positions must not be negative."""
    p = jnp.asarray(positions).astype(jnp.uint32)[..., None]
    shape = (1,) * (p.ndim - 1) + (-1,)
    hi, lo = jnp.asarray(hi_R).reshape(shape), jnp.asarray(lo_R).reshape(shape)
    return p * hi + _high_product(p, lo)


def _high_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Upper word of the 64-bit product of two uint32."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    return a1 * b1 + (middle >> 16) + ((a0 * b1 + (middle & 0xFFFF)) >> 16)


def cos_sin_of_turns(turns_: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 cos and sin of uint32 fractions of a turn (units of 2**-32), within 1e-7."""
    quadrant = (turns_ + (1 << 29)) >> 30
    rest = jax.lax.bitcast_convert_type(turns_ - (quadrant << 30), jnp.int32)
    angle = rest.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    odd = (quadrant & 1) == 1
    near, far = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    quadrant &= 3
    return (
        jnp.where((quadrant == 1) | (quadrant == 2), -near, near),
        jnp.where(quadrant >= 2, -far, far),
    )


def cos_sin(rotation: Rotation, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a rotation at int32 `positions` `[B, T]` (any shape; >= 0): float32 `[B, T, R]` each.

    Before `amplitude` and `growth` they are within 1e-7 of the exact value at every int32 position.
    """
    positions = jnp.asarray(positions).astype(jnp.uint32)
    if rotation.position_map is not None:
        positions = rotation.position_map(positions)
    row = (1,) * positions.ndim + (-1,)
    angle = turns(rotation.hi, rotation.lo, positions)
    if rotation.shift is not None:
        angle = angle + jnp.asarray(rotation.shift).reshape(row)
    cos, sin = cos_sin_of_turns(angle)
    scale = jnp.asarray(rotation.amplitude)
    if rotation.growth is not None:
        away = positions.astype(jnp.float32)[..., None] - rotation.center
        scale = scale * jnp.exp(jnp.asarray(rotation.growth).reshape(row) * away)
    return cos * scale, sin * scale
