"""What a compiled program needs to know of a positional scheme, and what a scheme is.

A `Form` is static and hashable: it says which pieces, layouts and callables there are. Everything that is a number (frequencies,
slopes, temperatures) enters as arrays, so schemes of the same form share one compiled program.

Legend: B batch, T query tokens, S key tokens, N heads, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from lcx.core.errors import UserError
from lcx.core.mask import Band
from lcx.core.params import ParamSpec
from lcx.positions import temperature as temperatures
from lcx.positions.angles import Phase as Phase
from lcx.positions.temperature import Temperature, TemperatureForm

Layout = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of the score matrix with its own rotation: phase names for queries and keys (None: not rotated) within a band."""

    q_phase: str | None
    k_phase: str | None
    band: Band = Band()


class BiasForm:
    """A frozen callable that gives tiles of an additive bias."""

    linear: ClassVar[bool] = False
    """The bias is `-slope * |distance|`, and `slopes` gives its slopes: all that some kernels can add."""

    def slopes(self, bias_params: Mapping[str, jax.Array]) -> jax.Array:
        """float32 `[N]`, of a linear bias."""
        raise TypeError(f"{type(self).__name__} is not linear")

    def __call__(self, bias_params: Mapping[str, jax.Array], q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N, T, S]` for int32 positions `[B, T]` and `[B, S]`."""
        raise TypeError(f"{type(self).__name__} gives no bias")


class EmbedForm:
    """A frozen callable that gives what is added to the token embeddings."""

    def __call__(
        self, params: Mapping[str, jax.Array], constants: Mapping[str, jax.Array], positions: jax.Array, model_dim: int
    ) -> jax.Array:
        """float32 `[B, T, D]` for int32 positions `[B, T]`."""
        raise TypeError(f"{type(self).__name__} gives no embedding")


@dataclasses.dataclass(frozen=True)
class Form:
    """The static side of a scheme. Bands of the pieces are disjoint and cover every distance."""

    pieces: tuple[Piece, ...] = (Piece(None, None),)
    layout: Layout = "half"
    bias: BiasForm | None = None
    temperature: TemperatureForm | None = None
    embed: EmbedForm | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the phases in use, each once, in the order in which the pieces name them."""
        names = [name for piece in self.pieces for name in (piece.q_phase, piece.k_phase) if name is not None]
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
    """A positional scheme: real-valued settings of one way to tell a model where its tokens are.

    `length` is always the declared length (a stage's `max_position`, or prompt + new tokens), never taken from a batch.
    """

    name: ClassVar[str] = ""

    temperature: Temperature | None = None

    def form(self, length: int) -> Form:
        """The static side at a declared length; raises `UserError` when the scheme cannot serve it."""
        return Form(temperature=self._temperature_form(length))

    def arrays(self, heads: Heads, length: int) -> dict[str, Any]:
        """Host arrays for the form: `{"phases": {name: Phase}, "bias": {}, "temperature": {}, "embed": {}}`, only keys in use."""
        form = self._temperature_form(length)
        if form is None:
            return {}
        gain, trained = self.logit_gain(length), self.trained_length
        values = temperatures.constants(gain) if self.temperature is None else self.temperature.arrays(trained, gain)
        return {"temperature": values}

    def specs(self, heads: Heads, length: int) -> dict[str, ParamSpec]:
        """Learned parameters, usually none; they go to the bias form, in one dict with its arrays, or to the embed form."""
        return {}

    def logit_gain(self, length: int) -> float:
        """A constant factor on all logits besides the kernel's scale."""
        return 1.0

    @property
    def trained_length(self) -> int | None:
        """The length that the scheme stretches from, where it knows one."""
        return getattr(self, "original_length", None)

    def to_hf(self) -> dict[str, Any]:
        """The scheme as a Hugging Face `rope_parameters` dict; raises `UserError` where there is none."""
        raise UserError(f"positional scheme {self.name!r} has no Hugging Face rope_parameters; export a rotary scheme")

    def _temperature_form(self, length: int) -> TemperatureForm | None:
        if self.temperature is not None:
            return TemperatureForm(self.temperature.kind)
        return TemperatureForm("constant") if self.logit_gain(length) != 1.0 else None
