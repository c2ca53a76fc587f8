"""The definition of a positional scheme, and of the part of it that a compiled program depends on.

A `SchemeSpec` is static and hashable: it lists the regions, layouts and callables. Everything that is a number (frequencies,
slopes, query scales) enters as buffers, so schemes with the same spec share one compiled program.

Legend: B batch, T query tokens, S key tokens, N heads, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from lcx.core.errors import UserError
from lcx.core.mask import Band
from lcx.core.param_spec import ParamSpec
from lcx.positions import query_scaling as temperatures
from lcx.positions.angles import Rotation as Rotation
from lcx.positions.query_scaling import QueryScaleFn, QueryScaling

Layout = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class Region:
    """Part of the score matrix with its own rotation: rotation names for queries and keys (None: not rotated) within a band."""

    q_rotation: str | None
    k_rotation: str | None
    band: Band = Band()


class BiasFn:
    """A frozen callable that returns tiles of an additive bias."""

    linear: ClassVar[bool] = False
    """True if the bias is `-slope * |distance|` with the slopes from `slopes`, the only kind that some kernels support."""

    def slopes(self, bias_params: Mapping[str, jax.Array]) -> jax.Array:
        """float32 `[N]`, of a linear bias."""
        raise TypeError(f"{type(self).__name__} is not linear")

    def __call__(self, bias_params: Mapping[str, jax.Array], q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N, T, S]` for int32 positions `[B, T]` and `[B, S]`."""
        raise TypeError(f"{type(self).__name__} has no bias")


class EmbedFn:
    """A frozen callable that returns what is added to the token embeddings."""

    def __call__(
        self, params: Mapping[str, jax.Array], constants: Mapping[str, jax.Array], positions: jax.Array, model_dim: int
    ) -> jax.Array:
        """float32 `[B, T, D]` for int32 positions `[B, T]`."""
        raise TypeError(f"{type(self).__name__} has no embedding")


@dataclasses.dataclass(frozen=True)
class SchemeSpec:
    """The static part of a scheme. The bands of its regions are disjoint and cover every distance."""

    regions: tuple[Region, ...] = (Region(None, None),)
    layout: Layout = "half"
    bias: BiasFn | None = None
    query_scale: QueryScaleFn | None = None
    embed: EmbedFn | None = None

    @property
    def rotations(self) -> tuple[str, ...]:
        """Names of the rotations in use, each once, in the order of the regions."""
        names = [name for region in self.regions for name in (region.q_rotation, region.k_rotation) if name is not None]
        return tuple(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes that a scheme may depend on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """A positional scheme: one way to tell a model where its tokens are, with its settings.

    `length` is always the declared length (a stage's `max_position`, or prompt + new tokens), never taken from a batch.
    """

    name: ClassVar[str] = ""

    temperature: QueryScaling | None = None

    def spec(self, length: int) -> SchemeSpec:
        """The static part at a declared length; raises `UserError` if the scheme does not support it."""
        return SchemeSpec(query_scale=self._query_scale(length))

    def buffers(self, heads: Heads, length: int) -> dict[str, Any]:
        """Host arrays of the spec: `{"rotations": {name: Rotation}, "bias": {}, "query_scale": {}, "embed": {}}`."""
        spec = self._query_scale(length)
        if spec is None:
            return {}
        gain, trained = self.logit_gain(length), self.trained_length
        values = temperatures.constants(gain) if self.temperature is None else self.temperature.buffers(trained, gain)
        return {"query_scale": values}

    def param_specs(self, heads: Heads, length: int) -> dict[str, ParamSpec]:
        """Learned parameters, usually none; they are passed to the bias form, in one dict with its arrays, or to the embed form."""
        return {}

    def logit_gain(self, length: int) -> float:
        """A constant factor on all logits in addition to the kernel's scale."""
        return 1.0

    @property
    def trained_length(self) -> int | None:
        """The length that the scheme extends from, or None if unknown."""
        return getattr(self, "original_length", None)

    def to_hf(self) -> dict[str, Any]:
        """The scheme as a Hugging Face `rope_parameters` dict; raises `UserError` if it has none."""
        raise UserError(f"positional scheme {self.name!r} has no Hugging Face rope_parameters; export a rotary scheme")

    def _query_scale(self, length: int) -> QueryScaleFn | None:
        if self.temperature is not None:
            return QueryScaleFn(self.temperature.kind)
        return QueryScaleFn("constant") if self.logit_gain(length) != 1.0 else None
