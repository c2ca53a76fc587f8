"""Schemes without rotation or bias: none at all, sinusoids, and a learned table.

Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.param_spec import Init, ParamSpec
from lcx.positions.angles import DIGITS, Rotation, cos_sin, encode
from lcx.positions.scheme import EmbedFn, Heads, Scheme, SchemeSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nope(Scheme):
    """No positional information except the mask's (NoPE, arXiv 2305.19466); Llama 4 combines it with a temperature."""

    name: ClassVar[str] = "nope"

    original_length: int | None = None

    def __post_init__(self) -> None:
        positive(self.name, original_length=self.original_length)


@dataclasses.dataclass(frozen=True)
class SinusoidalEmbed(EmbedFn):
    """Sines in the even dims, cosines in the odd ones."""

    def __call__(
        self, params: Mapping[str, jax.Array], constants: Mapping[str, jax.Array], positions: jax.Array, model_dim: int
    ) -> jax.Array:
        """float32 `[B, T, D]`; takes the constants `hi`, `lo`, `scale`."""
        cos, sin = cos_sin(Rotation(constants["hi"], constants["lo"], constants["scale"]), positions)
        return jnp.stack([sin, cos], axis=-1).reshape(*positions.shape, model_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoidal(Scheme):
    """Sinusoids added to the embeddings (arXiv 1706.03762), exact at every position; `scale` multiplies them."""

    name: ClassVar[str] = "sinusoidal"

    theta: float = 10000.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 < self.theta < float("inf"):
            raise UserError(f"sinusoidal.theta={self.theta!r} must be a number above 1, such as 10000")
        positive(self.name, scale=self.scale)

    def spec(self, length: int) -> SchemeSpec:
        """An embedding only."""
        return SchemeSpec(embed=SinusoidalEmbed(), query_scale=self._query_scale(length))

    def buffers(self, heads: Heads, length: int) -> dict[str, Any]:
        """`embed.hi`, `embed.lo` uint32 `[D / 2]` and `embed.scale`."""
        dim = heads.model_dim
        if dim % 2:
            raise UserError(f"sinusoidal needs an even model_dim, got {dim}; try {dim - 1} or {dim + 1}")
        with mpmath.workdps(DIGITS):
            hi, lo = encode(mpmath.power(self.theta, mpmath.mpf(-2 * i) / dim) for i in range(dim // 2))
        return {**super().buffers(heads, length), "embed": {"hi": hi, "lo": lo, "scale": np.asarray(self.scale, np.float32)}}


@dataclasses.dataclass(frozen=True)
class LearnedEmbed(EmbedFn):
    """A row of a learned table for each position."""

    def __call__(
        self, params: Mapping[str, jax.Array], constants: Mapping[str, jax.Array], positions: jax.Array, model_dim: int
    ) -> jax.Array:
        """float32 `[B, T, D]`; takes the parameter `table`. A position outside it gives NaN rather than another position's row."""
        return params["table"].astype(jnp.float32).at[positions].get(mode="fill", fill_value=jnp.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(Scheme):
    """A learned vector for each position below `max_length` added to the embeddings (GPT-2); it cannot be extended."""

    name: ClassVar[str] = "learned"

    max_length: int

    def __post_init__(self) -> None:
        positive(self.name, max_length=self.max_length)

    def spec(self, length: int) -> SchemeSpec:
        """An embedding; raises `UserError` if `length` exceeds the table."""
        if length > self.max_length:
            raise UserError(f"learned.max_length={self.max_length} is below length {length}; train a longer table")
        return SchemeSpec(embed=LearnedEmbed(), query_scale=self._query_scale(length))

    def param_specs(self, heads: Heads, length: int) -> dict[str, ParamSpec]:
        """`table` `[max_length, D]`."""
        return {"table": ParamSpec((self.max_length, heads.model_dim), (None, "embed"), Init("normal", 0.02))}
