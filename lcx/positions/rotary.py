"""Rotary embeddings: the rotation itself, its tables, and the schemes that need only one number besides theta.

Legend: B batch, T tokens, N heads, H head dim, R rotary pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

from lcx.core.configs import choice, positive
from lcx.core.errors import UserError
from lcx.positions.angles import DIGITS, MpFloat, Rotation, cos_sin, rotation
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.scheme import Heads, Layout, Region, Scheme, SchemeSpec

Tables = dict[str, tuple[jax.Array, jax.Array]]


def rotate_by(x_BTNH: jax.Array, name: str | None, tables: Tables, layout: Layout) -> jax.Array:
    """`x` rotated by the tables of this name, or as it is without a name."""
    return x_BTNH if name is None else rotate(x_BTNH, *tables[name], layout)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array, layout: Layout = "half") -> jax.Array:
    """`x` with its first 2R dims rotated, in the dtype of `x`; the rotation itself is float32.

    `half` pairs dims (i, i + R), as Hugging Face's Llama does; `interleaved` pairs (2i, 2i + 1), as Meta's checkpoints do.
    """
    pairs = cos_BTR.shape[-1]
    x, rest = x_BTNH[..., : 2 * pairs].astype(jnp.float32), x_BTNH[..., 2 * pairs :]
    cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    if layout == "half":
        first, second = x[..., :pairs], x[..., pairs:]
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    out = jnp.concatenate(turned, axis=-1) if layout == "half" else jnp.stack(turned, axis=-1).reshape(x.shape)
    return jnp.concatenate([out.astype(x_BTNH.dtype), rest], axis=-1)


def tables(spec: SchemeSpec, buffers: Mapping[str, Any], positions: jax.Array) -> Tables:
    """Cosines and sines, float32 `[B, T, R]` each, of every rotation of `spec` at int32 positions `[B, T]`.

    Compute them once per kind of layer, outside the scan over layers; where layers are not scanned, the barrier keeps XLA from
    computing them again in each.
    """
    return jax.lax.optimization_barrier({name: cos_sin(buffers["rotations"][name], positions) for name in spec.rotations})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(Scheme):
    """Plain rotary embedding, frequencies `theta ** (-2i / d)` (RoFormer, arXiv 2104.09864).

    `partial` is the fraction of the head's dims that are rotated, d = int(head_dim * partial). `original_length` is the length
    that the model was trained at: schemes that extend it need it, here it is only passed along.
    """

    name: ClassVar[str] = "rope"

    theta: float = 10000.0
    layout: Layout = "half"
    partial: float = 1.0
    original_length: int | None = None

    def __post_init__(self) -> None:
        if not 1 < self.theta < float("inf"):
            raise UserError(f"{self.name}.theta={self.theta!r} must be a number above 1, such as 10000")
        choice(f"{self.name}.layout", self.layout, ("half", "interleaved"))
        if not 0 < self.partial <= 1:
            raise UserError(f"{self.name}.partial={self.partial!r} must be above 0 and at most 1")
        positive(self.name, original_length=self.original_length)
        if isinstance(self.temperature, str):
            raise UserError(f"{self.name}.temperature={self.temperature!r} must be a QueryScaling, like {QueryScaling('llama4')}")

    def rotary_dim(self, head_dim: int) -> int:
        """Number of rotated dims; raises `UserError` if they cannot be paired."""
        return even_dim(self.name, head_dim, self.partial)

    def frequencies(self, head_dim: int, length: int) -> list[MpFloat]:
        """Radians per position of the R pairs in extended precision, scaled for the declared length."""
        with mpmath.workdps(DIGITS):
            dim = self.rotary_dim(head_dim)
            return self._scaled(powers(self._base(dim, length), dim, dim // 2), dim, length)

    def inverse_frequencies(self, head_dim: int, length: int) -> np.ndarray:
        """`frequencies` rounded to float64 `[R]`, for plots and comparisons."""
        return np.asarray([float(f) for f in self.frequencies(head_dim, length)])

    def amplitude(self, length: int) -> float:
        """Factor on cos and sin of queries and keys alike."""
        return 1.0

    def spec(self, length: int) -> SchemeSpec:
        """One region: queries and keys are rotated once."""
        return SchemeSpec(regions=(Region("rotary", "rotary"),), layout=self.layout, query_scale=self._query_scale(length))

    def buffers(self, heads: Heads, length: int) -> dict[str, Any]:
        """One rotation, `rotary`."""
        return {**super().buffers(heads, length), "rotations": {"rotary": self.rotation(heads, length)}}

    def rotation(self, heads: Heads, length: int, **optional: Any) -> Rotation:
        """The scheme's frequencies and amplitude as a rotation; `optional` sets further fields of the rotation."""
        return rotation(self.frequencies(heads.head_dim, length), self.amplitude(length), **optional)

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters` of transformers 5; the layout is a property of the family there, not of this dict."""
        values: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        if self.partial != 1:
            values["partial_rotary_factor"] = self.partial
        if self.temperature is not None:
            if self.temperature.kind != "ministral":
                raise UserError(
                    f"temperature {self.temperature.kind!r} does not exist in Hugging Face rope_parameters; only 'ministral' does"
                )
            constants = self.temperature.buffers(self.original_length)
            values["llama_4_scaling_beta"] = float(self.temperature.scale or 0.1)
            values["original_max_position_embeddings"] = int(constants["length"])
        return values

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> Rope:
        """The scheme of one flat `rope_parameters` dict; `common` are settings from other keys of the model's config."""
        return cls(**common)

    def _base(self, dim: int, length: int) -> MpFloat:
        return mpmath.mpf(self.theta)

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        return frequencies


def even_dim(name: str, head_dim: int, partial: float) -> int:
    """`int(head_dim * partial)`; raises `UserError` when that is odd or below 2."""
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise UserError(
            f"{name} would rotate int(head_dim {head_dim} * partial {partial}) = {dim} dims; "
            f"choose an even number of at least 2, such as {max(2, dim - dim % 2)}"
        )
    return dim


def powers(base: MpFloat | float, dim: int, pairs: int) -> list[MpFloat]:
    """`base ** (-2i / dim)` for the first `pairs` values of i, in the working precision."""
    return [mpmath.power(base, mpmath.mpf(-2 * i) / dim) for i in range(pairs)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretched(Rope):
    """Base of the scaling schemes: a factor, or None for declared length / trained length (at least 1)."""

    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None and not 1 <= self.factor < float("inf"):
            raise UserError(f"{self.name}.factor={self.factor!r} must be at least 1; it is target length / trained length")

    def spec(self, length: int) -> SchemeSpec:
        """One region; raises `UserError` if the factor cannot be determined."""
        self.stretch(length)
        return super().spec(length)

    def stretch(self, length: int) -> float:
        """The factor in force at a declared length."""
        if self.factor is not None:
            return self.factor
        if self.original_length is None:
            raise UserError(f"{self.name} needs {self.name}.factor, or {self.name}.original_length to derive it from")
        return max(1.0, length / self.original_length)

    def needs_original_length(self) -> int:
        """The trained length; raises `UserError` if it is not set."""
        if self.original_length is None:
            raise UserError(f"{self.name} needs {self.name}.original_length, the length that the model was trained at")
        return self.original_length

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters` with the factor, which must be set: Hugging Face has no declared length."""
        if self.factor is None:
            raise UserError(f"{self.name}.factor is not set; set the factor that the exported model should use")
        return {**super().to_hf(), "rope_type": self.name, "factor": self.factor}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Stretched):
    """Position interpolation: every frequency divided by the factor (arXiv 2306.15595)."""

    name: ClassVar[str] = "linear"

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> Linear:
        """Reads `factor`."""
        return cls(factor=parameters.get("factor"), **common)

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        return [f / mpmath.mpf(self.stretch(length)) for f in frequencies]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ntk(Stretched):
    """NTK-aware: theta times `factor ** (d / (d - 2))`, so that the slowest pair is divided by the factor (r/LocalLLaMA, 2023)."""

    name: ClassVar[str] = "ntk"

    def to_hf(self) -> dict[str, Any]:
        """Raises `UserError`: it would be plain rotary with an enlarged theta that depends on the head dim, unknown here."""
        raise UserError("ntk has no Hugging Face rope_type; export rope with theta = lcx.positions.theta.ntk_base(...)")

    def _base(self, dim: int, length: int) -> MpFloat:
        return mpmath.mpf(self.theta) * ntk_growth(self.stretch(length), dim)


def ntk_growth(factor: float | MpFloat, dim: int) -> MpFloat:
    """`factor ** (d / (d - 2))`; raises `UserError` for a rotary dim of 2, for which it is undefined."""
    if dim <= 2:
        raise UserError(f"NTK-aware scaling needs a rotary dim above 2, got {dim}; use linear")
    return mpmath.power(factor, mpmath.mpf(dim) / (dim - 2))
