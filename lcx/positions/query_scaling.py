"""Temperatures: factors on the queries that grow with the number of keys before them, so that attention stays sharp over more.

A temperature multiplies q only, before the kernel, never the bias. Where a row's positions skip, keys are counted, not positions.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.configs import choice, positive
from lcx.core.errors import UserError

Kind = Literal["llama4", "ministral", "log_n", "ssmax", "constant"]
KINDS = ("llama4", "ministral", "log_n", "ssmax", "constant")


def scale_queries(q_BTNH: jax.Array, factors_BT: jax.Array | None) -> jax.Array:
    """Queries times their float32 factors, multiplied in float32, in the queries' dtype; None leaves them as they are."""
    return q_BTNH if factors_BT is None else (q_BTNH.astype(jnp.float32) * factors_BT[:, :, None, None]).astype(q_BTNH.dtype)


@dataclasses.dataclass(frozen=True)
class QueryScaleFn:
    """The static part of a temperature; `constants` come from `QueryScaling.buffers`."""

    kind: Kind

    def __call__(self, constants: dict[str, jax.Array], positions: jax.Array) -> jax.Array:
        """float32 factors on the queries, of the shape of int32 `positions` `[B, T]`: how many keys come before each."""
        gain, scale, length = constants["gain"], constants["scale"], constants["length"]
        positions = jnp.asarray(positions).astype(jnp.uint32)
        match self.kind:
            case "llama4":
                value = 1 + scale * jnp.log1p(((positions + 1) // length).astype(jnp.float32))
            case "ministral":
                value = 1 + scale * jnp.log1p((positions // length).astype(jnp.float32))
            case "log_n":
                keys = (positions + 1).astype(jnp.float32)
                value = jnp.maximum(1.0, jnp.log(keys) / jnp.log(jnp.asarray(length).astype(jnp.float32)))
            case "ssmax":
                value = scale * jnp.log((positions + 1).astype(jnp.float32))
            case _:
                value = jnp.ones(positions.shape, jnp.float32)
        return gain * value


@dataclasses.dataclass(frozen=True)
class QueryScaling:
    """Settings of a temperature, where n is the number of keys that the query at position p = n - 1 may see.

    - `llama4`: `1 + scale * ln(1 + floor(n / length))`, defaults 0.1 and 8192 (Llama 4, in its layers without rotary).
    - `ministral`: `1 + scale * ln(1 + floor(p / length))`, defaults 0.1 and the trained length (Ministral 3).
    - `log_n`: `max(1, ln n / ln length)` (Qwen).
    - `ssmax`: `scale * ln n`, default 0.43 (SSMax, arXiv 2501.19399, with a fixed scale in place of a learned one).

    `length` None means the scheme's trained length.
    """

    kind: Literal["llama4", "ministral", "log_n", "ssmax"]
    scale: float | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        choice("temperature.kind", self.kind, KINDS[:-1])
        positive("temperature", scale=self.scale, length=self.length)

    def buffers(self, trained_length: int | None, gain: float = 1.0) -> dict[str, Any]:
        """Constants for the form; raises `UserError` if the kind needs a length and none is given."""
        scale = {"llama4": 0.1, "ministral": 0.1, "ssmax": 0.43}.get(self.kind, 1.0) if self.scale is None else self.scale
        length = self.length or (8192 if self.kind == "llama4" else trained_length)
        if length is None and self.kind != "ssmax":
            raise UserError(f"temperature {self.kind} needs temperature.length, the length that the model was trained at")
        if self.kind == "log_n" and length is not None and length < 2:
            raise UserError(f"temperature.length={length} must be at least 2 for log_n, which divides by its logarithm")
        return constants(gain, scale, length or 1)


def constants(gain: float = 1.0, scale: float = 1.0, length: int = 1) -> dict[str, Any]:
    """Arrays of a temperature form."""
    return {
        "gain": np.asarray(gain, np.float32),
        "scale": np.asarray(scale, np.float32),
        "length": np.asarray(length, np.uint32),
    }
