"""Rotary schemes in several regions: SelfExtend, ReRoPE and dual chunk attention.

Near keys are rotated as in training, far ones such that no relative position exceeds what the model was trained on. Keys are
stored unrotated, and each region rotates them; the bands of the regions are disjoint and cover everything.

Legend: w window, G group, c trained length, s chunk.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import mpmath
import numpy as np

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.core.mask import Band
from lcx.positions.angles import DIGITS, MpFloat, Rotation, encode, position_map
from lcx.positions.rotary import Rope
from lcx.positions.scheme import Heads, Region, SchemeSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piecewise(Rope):
    """Base of the piecewise schemes; `scaling` may be another rotary scheme whose frequencies and amplitude are used.

    Qwen2.5-1M, for example, is dual chunk attention over YaRN. Both must agree on theta, layout and partial.
    """

    scaling: Rope | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling is None:
            return
        if isinstance(self.scaling, Piecewise) or self.scaling.name == "xpos":
            raise UserError(f"{self.name}.scaling={self.scaling.name!r} has several rotations; use a scheme with one, such as yarn")
        for key in ("theta", "layout", "partial"):
            outer, inner = getattr(self, key), getattr(self.scaling, key)
            if outer != inner:
                raise UserError(f"{self.name}.{key}={outer!r} and {self.name}.scaling.{key}={inner!r} must be equal")
        if self.scaling.temperature is not None:
            raise UserError(f"{self.name}.scaling.temperature is not used; set {self.name}.temperature instead")

    def rotary_dim(self, head_dim: int) -> int:
        """Number of rotated dims."""
        return super().rotary_dim(head_dim) if self.scaling is None else self.scaling.rotary_dim(head_dim)

    def frequencies(self, head_dim: int, length: int) -> list[MpFloat]:
        """The scaling scheme's frequencies, or plain ones."""
        return super().frequencies(head_dim, length) if self.scaling is None else self.scaling.frequencies(head_dim, length)

    def amplitude(self, length: int) -> float:
        """The scaling scheme's amplitude, or 1."""
        return 1.0 if self.scaling is None else self.scaling.amplitude(length)

    def logit_gain(self, length: int) -> float:
        """The scaling scheme's gain, or 1."""
        return 1.0 if self.scaling is None else self.scaling.logit_gain(length)

    def spec(self, length: int) -> SchemeSpec:
        """The scheme's regions."""
        if self.scaling is not None:
            self.scaling.spec(length)
        return SchemeSpec(regions=self.regions(), layout=self.layout, query_scale=self._query_scale(length))

    def buffers(self, heads: Heads, length: int) -> dict[str, Any]:
        """The scheme's rotations."""
        return {**super(Rope, self).buffers(heads, length), "rotations": self.rotations(heads, length)}

    def regions(self) -> tuple[Region, ...]:
        """Regions with disjoint bands that cover everything."""
        raise TypeError(f"{type(self).__name__} has no regions")

    def rotations(self, heads: Heads, length: int) -> dict[str, Rotation]:
        """Rotations by the names used in the regions."""
        raise TypeError(f"{type(self).__name__} has no rotations")

    def to_hf(self) -> dict[str, Any]:
        """Raises `UserError`: Hugging Face has no such rope type."""
        raise UserError(f"{self.name} has no Hugging Face rope_type; export the underlying rotary scheme")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfExtend(Piecewise):
    """SelfExtend (arXiv 2401.01325): beyond `window` tokens positions are counted in groups, `i // G - j // G + w - w // G`.

    Reaches `(c - w) * G + w` tokens.
    """

    name: ClassVar[str] = "self_extend"

    window: int
    group: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, window=self.window, group=self.group)

    def regions(self) -> tuple[Region, ...]:
        """Near and far, split at the window."""
        near = Region("near", "near", Band(None, self.window))
        return near, Region("far_query", "far_key", Band(self.window, None))

    def rotations(self, heads: Heads, length: int) -> dict[str, Rotation]:
        """Plain positions near; groups far away, with queries shifted so that both agree at the window."""
        plain = self.rotation(heads, length)
        return {
            "near": plain,
            "far_query": dataclasses.replace(
                plain, position_map=position_map(divide=self.group, offset=self.window - self.window // self.group)
            ),
            "far_key": dataclasses.replace(plain, position_map=position_map(divide=self.group)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerope(Piecewise):
    """ReRoPE (Su, 2023): relative position `min(i - j, w)`. Far keys are not rotated, and far queries are all rotated to w."""

    name: ClassVar[str] = "rerope"

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, window=self.window)

    def regions(self) -> tuple[Region, ...]:
        """Near and far, split at the window."""
        return Region("near", "near", Band(None, self.window)), Region("far_query", None, Band(self.window, None))

    def rotations(self, heads: Heads, length: int) -> dict[str, Rotation]:
        """Plain positions near; far away every query at w, with the amplitude that the unrotated keys lack."""
        plain = self.rotation(heads, length)
        squared = np.asarray(self.amplitude(length) ** 2, np.float32)
        return {
            "near": plain,
            "far_query": dataclasses.replace(plain, position_map=position_map(modulo=1, offset=self.window), amplitude=squared),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakyRerope(Piecewise):
    """Leaky ReRoPE (Su, 2023): beyond the window relative positions grow at 1/k of the rate, `w + (i - j - w) / k`."""

    name: ClassVar[str] = "leaky_rerope"

    window: int
    k: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, window=self.window)
        if not 1 <= self.k < math.inf:
            raise UserError(f"leaky_rerope.k={self.k!r} must be at least 1, since it divides the distance beyond the window")

    def regions(self) -> tuple[Region, ...]:
        """Near and far, split at the window."""
        near = Region("near", "near", Band(None, self.window))
        return near, Region("far_query", "far_key", Band(self.window, None))

    def rotations(self, heads: Heads, length: int) -> dict[str, Rotation]:
        """Far frequencies are divided by k, and far queries are rotated by what is then missing at the window, `w - w / k`."""
        with mpmath.workdps(DIGITS):
            plain = self.frequencies(heads.head_dim, length)
            slow_hi, slow_lo = encode(f / mpmath.mpf(self.k) for f in plain)
            shift, _ = encode(f * (self.window - self.window / mpmath.mpf(self.k)) for f in plain)
        near = self.rotation(heads, length)
        slow = dataclasses.replace(near, hi=slow_hi, lo=slow_lo)
        return {"near": near, "far_query": dataclasses.replace(slow, shift=shift), "far_key": slow}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualChunk(Piecewise):
    """Dual chunk attention (arXiv 2402.17463; Qwen2.5-1M): positions restart in every chunk of s tokens.

    Keys are at position `p % s`. Queries are at `p % s` for keys of their own chunk, at `min(p % s + s, c - 1)` for keys of the
    previous chunk, and at `c - 1` for all earlier ones; c is `original_length`, s is `chunk` (default 3/4 of c).
    """

    name: ClassVar[str] = "dual_chunk"

    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, chunk=self.chunk)
        if self.chunk is not None and self.original_length is not None and self.chunk >= self.original_length:
            raise UserError(
                f"dual_chunk.chunk={self.chunk} must be below dual_chunk.original_length={self.original_length}; "
                f"the rest is the local window, such as {max(1, self.original_length * 3 // 4)}"
            )

    def sizes(self) -> tuple[int, int]:
        """Trained length and chunk; raises `UserError` if the former is not set."""
        trained = self.original_length or (self.scaling.original_length if self.scaling is not None else None)
        if trained is None:
            raise UserError("dual_chunk needs dual_chunk.original_length, the length that the model was trained at")
        return trained, self.chunk or max(1, trained * 3 // 4)

    def regions(self) -> tuple[Region, ...]:
        """Split by the distance in chunks between query and key: zero, one, or more."""
        _, chunk = self.sizes()
        if chunk == 1:
            raise UserError("dual_chunk.chunk=1 must be at least 2")
        return (
            Region("intra", "key", Band(None, 1, chunk)),
            Region("successive", "key", Band(1, 2, chunk)),
            Region("inter", "key", Band(2, None, chunk)),
        )

    def rotations(self, heads: Heads, length: int) -> dict[str, Rotation]:
        """Four rotations; `intra` and `key` have the same positions."""
        trained, chunk = self.sizes()
        plain = self.rotation(heads, length)
        within = dataclasses.replace(plain, position_map=position_map(modulo=chunk))
        return {
            "intra": within,
            "successive": dataclasses.replace(plain, position_map=position_map(modulo=chunk, offset=chunk, clip=trained - 1)),
            "inter": dataclasses.replace(plain, position_map=position_map(modulo=1, offset=trained - 1)),
            "key": within,
        }
