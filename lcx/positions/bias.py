"""Additive biases on the scores: ALiBi, T5's buckets, KERPLE and FIRE.

Distances between positions are computed as int32 and only then converted to float32. A form also gives finite values for keys
after the query (by the magnitude of the distance), since the mask and not the bias decides what is visible.

Legend: B batch, T query tokens, S key tokens, N heads, W width of FIRE's network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.param_spec import Init, ParamSpec
from lcx.positions.scheme import BiasFn, Heads, Scheme, SchemeSpec


def distances(q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    """int32 `[B, T, S]` of query minus key positions."""
    return q_positions[:, :, None] - k_positions[:, None, :]


def _per_head(values_N: jax.Array) -> jax.Array:
    return jnp.asarray(values_N, jnp.float32)[None, :, None, None]


@dataclasses.dataclass(frozen=True)
class AlibiBias(BiasFn):
    """`-slope * |distance|`."""

    linear: ClassVar[bool] = True

    def slopes(self, bias_params: Mapping[str, jax.Array]) -> jax.Array:
        """float32 `[N]`."""
        return bias_params["slopes"]

    def __call__(self, bias_params: Mapping[str, jax.Array], q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N, T, S]`; takes `slopes` `[N]`."""
        away = jnp.abs(distances(q_positions, k_positions)).astype(jnp.float32)
        return -_per_head(bias_params["slopes"]) * away[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi(Scheme):
    """ALiBi (arXiv 2108.12409): a fixed slope per head. `scale` multiplies the slopes; use a value below 1 for a longer context."""

    name: ClassVar[str] = "alibi"

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self.name, scale=self.scale)

    def spec(self, length: int) -> SchemeSpec:
        """A bias only."""
        return SchemeSpec(bias=AlibiBias(), query_scale=self._query_scale(length))

    def buffers(self, heads: Heads, length: int) -> dict[str, Any]:
        """`bias.slopes` float32 `[N]`."""
        slopes = self.scale * np.asarray(alibi_slopes(heads.num_heads))
        return {**super().buffers(heads, length), "bias": {"slopes": slopes.astype(np.float32)}}


def alibi_slopes(num_heads: int) -> list[float]:
    """`2 ** (-8k / c)`, k = 1..c, for the power of two c below the number of heads; the rest are odd powers of `2 ** (-4 / c)`."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    return slopes + [2 ** (-4 * k / power) for k in range(1, 2 * (num_heads - power), 2)]


@dataclasses.dataclass(frozen=True)
class T5Bias(BiasFn):
    """A learned number for each bucket of distances."""

    buckets: int
    max_distance: int
    bidirectional: bool

    def __call__(self, bias_params: Mapping[str, jax.Array], q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N, T, S]`; takes `table` `[buckets, N]`."""
        bucket = self.bucket(distances(q_positions, k_positions))
        return jnp.moveaxis(jnp.asarray(bias_params["table"], jnp.float32)[bucket], -1, 1)

    def bucket(self, distance: jax.Array) -> jax.Array:
        """int32 bucket of each query-minus-key distance: exact ones first, then logarithmic up to `max_distance`."""
        buckets, first = self.buckets, jnp.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = jnp.where(distance < 0, buckets, 0)
            distance = jnp.abs(distance)
        distance = jnp.maximum(distance, 0)
        exact = buckets // 2
        # Thresholds on the host: so the bucket of an integer distance does not depend on float32 logarithms.
        far = np.asarray([_first_in_bucket(n, exact, buckets, self.max_distance) for n in range(exact, buckets)], np.int32)
        log = exact - 1 + jnp.sum(distance[..., None] >= far.reshape((1,) * distance.ndim + (-1,)), axis=-1, dtype=jnp.int32)
        return first + jnp.where(distance < exact, distance, log)


def _first_in_bucket(bucket: int, exact: int, buckets: int, max_distance: int) -> int:
    """Smallest distance whose logarithmic bucket is at least `bucket`."""
    value = exact * (max_distance / exact) ** ((bucket - exact) / (buckets - exact))
    return round(value) if abs(value - round(value)) < 1e-9 * value else math.ceil(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5(Scheme):
    """T5's relative bias (arXiv 1910.10683): 32 learned buckets per head, logarithmic up to a distance of 128, one beyond.

    `focus` is the logit with which head h initially looks h tokens back. Above zero, a layer starts with the previous-token
    heads that induction is built from (Olsson et al., arXiv 2209.11895), which a small model otherwise takes long to find.
    """

    name: ClassVar[str] = "t5"

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    focus: float = 0.0

    def __post_init__(self) -> None:
        least = 4 if self.bidirectional else 2
        if self.buckets < least or self.buckets % least:
            raise UserError(f"t5.buckets={self.buckets} must be divisible by {least}, such as 32")
        exact = self.buckets // least
        if self.max_distance <= exact:
            raise UserError(f"t5.max_distance={self.max_distance} must be above the {exact} exact buckets")

    def spec(self, length: int) -> SchemeSpec:
        """A bias only."""
        return SchemeSpec(bias=T5Bias(self.buckets, self.max_distance, self.bidirectional), query_scale=self._query_scale(length))

    def param_specs(self, heads: Heads, length: int) -> dict[str, ParamSpec]:
        """`table` `[buckets, N]`."""
        init = Init("diagonal", self.focus) if self.focus else Init("normal", 0.02)
        return {"table": ParamSpec((self.buckets, heads.num_heads), (None, "heads"), init)}


@dataclasses.dataclass(frozen=True)
class KerpleBias(BiasFn):
    """`-r1 * ln(1 + r2 * |distance|)` with positive r1, r2."""

    def __call__(self, bias_params: Mapping[str, jax.Array], q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N, T, S]`; takes `log_r1`, `log_r2` `[N]`: a logarithm keeps them positive under any optimizer."""
        away = jnp.abs(distances(q_positions, k_positions)).astype(jnp.float32)[:, None]
        r1, r2 = jnp.exp(_per_head(bias_params["log_r1"])), jnp.exp(_per_head(bias_params["log_r2"]))
        return -r1 * jnp.log1p(r2 * away)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kerple(Scheme):
    """KERPLE, logarithmic kernel (arXiv 2205.09921): two learned positive numbers per head."""

    name: ClassVar[str] = "kerple"

    r1: float = 1.0
    r2: float = 1.0

    def __post_init__(self) -> None:
        positive(self.name, r1=self.r1, r2=self.r2)

    def spec(self, length: int) -> SchemeSpec:
        """A bias only."""
        return SchemeSpec(bias=KerpleBias(), query_scale=self._query_scale(length))

    def param_specs(self, heads: Heads, length: int) -> dict[str, ParamSpec]:
        """`log_r1`, `log_r2` `[N]`, starting at the logarithms of the settings."""
        starts = {"log_r1": math.log(self.r1), "log_r2": math.log(self.r2)}
        return {key: ParamSpec((heads.num_heads,), ("heads",), Init("constant", value)) for key, value in starts.items()}


@dataclasses.dataclass(frozen=True)
class FireBias(BiasFn):
    """`MLP(ln(1 + c d) / ln(1 + c max(i, L)))` with learned c and L."""

    def __call__(self, bias_params: Mapping[str, jax.Array], q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """float32 `[B, N, T, S]`; takes `log_c`, `log_l` `[]`, `hidden` and `shift` `[W]`, `out` `[W, N]`, `offset` `[N]`."""
        away = jnp.abs(distances(q_positions, k_positions)).astype(jnp.float32)
        slope, threshold = jnp.exp(bias_params["log_c"]), jnp.exp(bias_params["log_l"])
        reach = jnp.maximum(q_positions.astype(jnp.float32), threshold)[:, :, None]
        ratio = jnp.log1p(slope * away) / jnp.log1p(slope * reach)
        hidden, shift = (bias_params[key][None, None, None, :] for key in ("hidden", "shift"))
        inner = jax.nn.relu(ratio[..., None] * hidden + shift)
        return jnp.einsum("btsw,wn->bnts", inner, bias_params["out"]) + _per_head(bias_params["offset"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fire(Scheme):
    """FIRE (arXiv 2310.04418): a small learned function of the distance relative to the query's position.

    `threshold` is the initial value of L: positions below it are normalised as if they were at L.
    """

    name: ClassVar[str] = "fire"

    width: int = 32
    c: float = 0.1
    threshold: float = 512.0

    def __post_init__(self) -> None:
        positive(self.name, width=self.width, c=self.c, threshold=self.threshold)

    def spec(self, length: int) -> SchemeSpec:
        """A bias only."""
        return SchemeSpec(bias=FireBias(), query_scale=self._query_scale(length))

    def param_specs(self, heads: Heads, length: int) -> dict[str, ParamSpec]:
        """The network and its two scalars."""
        width, count = self.width, heads.num_heads
        return {
            "log_c": ParamSpec((), (), Init("constant", math.log(self.c))),
            "log_l": ParamSpec((), (), Init("constant", math.log(self.threshold))),
            "hidden": ParamSpec((width,), (None,), Init("normal", 1.0)),
            "shift": ParamSpec((width,), (None,), Init("normal", 0.5)),
            "out": ParamSpec((width, count), (None, "heads"), Init("normal", width**-0.5)),
            "offset": ParamSpec((count,), ("heads",), Init("constant", 0.0)),
        }
