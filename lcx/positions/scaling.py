"""Rotary schemes that treat slow and fast pairs differently: dynamic NTK, NTK-by-parts, YaRN, Llama 3.1, LongRoPE, p-RoPE.

Legend: R rotary pairs, d rotary dims.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import mpmath

from lcx.core.configs import choice, positive
from lcx.core.errors import UserError
from lcx.positions.angles import MpFloat
from lcx.positions.rotary import Rope, Stretched, even_dim, ntk_growth
from lcx.positions.scheme import SchemeSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(Stretched):
    """Dynamic NTK: theta times `(s * n / L0 - (s - 1)) ** (d / (d - 2))`, n the declared length, at least L0 (r/LocalLLaMA 2023).

    It is plain rotary up to the trained length, whatever the factor, which defaults to 1 here.
    """

    name: ClassVar[str] = "dynamic"

    def stretch(self, length: int) -> float:
        """The factor on theta before it is raised to d / (d - 2)."""
        trained, factor = self.needs_original_length(), self.factor or 1.0
        return factor * max(length, trained) / trained - (factor - 1)

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters`; Hugging Face reads L0 from the model's `max_position_embeddings`."""
        return {**super().to_hf(), "original_max_position_embeddings": self.needs_original_length()}

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> Dynamic:
        """Reads `factor`."""
        return cls(factor=parameters.get("factor"), **common)

    def _base(self, dim: int, length: int) -> MpFloat:
        return mpmath.mpf(self.theta) * ntk_growth(self.stretch(length), dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkByParts(Stretched):
    """NTK-by-parts: pairs that turn more than `beta_fast` times in the trained length are kept, those below `beta_slow` turns are
    divided by the factor, with a linear ramp over the number of turns between (YaRN, arXiv 2309.00071, eq. 18-20)."""

    name: ClassVar[str] = "ntk_by_parts"

    beta_slow: float = 1.0
    beta_fast: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, beta_slow=self.beta_slow)
        if not self.beta_fast > self.beta_slow:
            raise UserError(f"{self.name}.beta_fast={self.beta_fast} must be above {self.name}.beta_slow={self.beta_slow}")

    def spec(self, length: int) -> SchemeSpec:
        """One piece; raises `UserError` if the trained length is not set."""
        self.needs_original_length()
        return super().spec(length)

    def to_hf(self) -> dict[str, Any]:
        """Raises `UserError`: Hugging Face's YaRN has a different ramp."""
        raise UserError(f"{self.name} has no Hugging Face rope_type; use 'yarn' (with variant 'hf') instead")

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        return self._by_turns(frequencies, length)

    def _by_turns(self, frequencies: list[MpFloat], length: int) -> list[MpFloat]:
        trained, factor = self.needs_original_length(), mpmath.mpf(self.stretch(length))
        slow, fast = mpmath.mpf(self.beta_slow), mpmath.mpf(self.beta_fast)
        kept = [min(mpmath.mpf(1), max(mpmath.mpf(0), (trained * f / (2 * mpmath.pi) - slow) / (fast - slow))) for f in frequencies]
        return [(1 - keep) * f / factor + keep * f for f, keep in zip(frequencies, kept, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(NtkByParts):
    """YaRN (arXiv 2309.00071): NTK-by-parts and a factor `0.1 ln s + 1` on cos and sin of queries and keys.

    `variant` `hf` ramps over the index of the pair as Hugging Face and most checkpoints do (`truncate` rounds the ramp's ends);
    `paper` ramps over turns. `attention_factor` overrides the factor on cos and sin. DeepSeek: `mscale` and `mscale_all_dim`
    make it m(s, mscale) / m(s, mscale_all_dim), m(s, x) = 0.1 x ln s + 1; with `scale_softmax` the logits are also multiplied by
    m(s, mscale_all_dim) ** 2, as DeepSeek's attention does.
    """

    name: ClassVar[str] = "yarn"

    variant: Literal["hf", "paper"] = "hf"
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    scale_softmax: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("yarn.variant", self.variant, ("hf", "paper"))
        positive("yarn", attention_factor=self.attention_factor)
        if self.scale_softmax and not self.mscale_all_dim:
            raise UserError("yarn.scale_softmax needs yarn.mscale_all_dim, which sets the amount")

    def amplitude(self, length: int) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.stretch(length)
        if self.mscale and self.mscale_all_dim:
            return magnitude(factor, self.mscale) / magnitude(factor, self.mscale_all_dim)
        return magnitude(factor)

    def logit_gain(self, length: int) -> float:
        """DeepSeek's factor on the softmax scale, if `scale_softmax` is set."""
        return magnitude(self.stretch(length), self.mscale_all_dim or 0.0) ** 2 if self.scale_softmax else 1.0

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters`; `scale_softmax` is a property of the family there."""
        if self.variant == "paper":
            raise UserError("yarn.variant='paper' ramps over turns, unlike Hugging Face's yarn; use variant 'hf' to export")
        values = Stretched.to_hf(self)
        trained = self.needs_original_length()
        if values.get("original_max_position_embeddings", trained) != trained:
            raise UserError(f"temperature.length must equal yarn.original_length={trained} in Hugging Face rope_parameters")
        values |= {"original_max_position_embeddings": trained, "beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, key) is not None:
                values[key] = getattr(self, key)
        return values if self.truncate else {**values, "truncate": False}

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> Yarn:
        """Reads YaRN's keys; a missing or empty key gets its default."""
        keys = ("factor", "attention_factor", "mscale", "mscale_all_dim")
        given = {key: parameters[key] for key in keys if parameters.get(key) is not None}
        given |= {key: parameters[key] for key in ("beta_fast", "beta_slow") if parameters.get(key)}
        return cls(truncate=bool(parameters.get("truncate", True)), **given, **common)

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        if self.variant == "paper":
            return self._by_turns(frequencies, length)
        trained, factor = self.needs_original_length(), mpmath.mpf(self.stretch(length))

        def index(turns: float) -> float:
            return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = mpmath.mpf(high - low) if high != low else mpmath.mpf("0.001")
        divided = [min(mpmath.mpf(1), max(mpmath.mpf(0), (i - mpmath.mpf(low)) / width)) for i in range(len(frequencies))]
        return [f / factor * ramp + f * (1 - ramp) for f, ramp in zip(frequencies, divided, strict=True)]


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's `0.1 * mscale * ln(factor) + 1`, 1 for factors up to 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(Stretched):
    """Llama 3.1: wavelengths above L0 / low divided by the factor, below L0 / high kept, smoothly between (reference code)."""

    name: ClassVar[str] = "llama3"

    factor: float | None = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int | None = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, low_freq_factor=self.low_freq_factor)
        if not self.high_freq_factor > self.low_freq_factor:
            raise UserError(f"llama3.high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}")

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters`."""
        return {
            **super().to_hf(),
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.needs_original_length(),
        }

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> Llama3:
        """Reads `factor` and the two frequency factors."""
        return cls(**{key: parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}, **common)

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        trained, factor = self.needs_original_length(), mpmath.mpf(self.stretch(length))
        low, high = mpmath.mpf(self.low_freq_factor), mpmath.mpf(self.high_freq_factor)
        turns = [trained * f / (2 * mpmath.pi) for f in frequencies]
        smooth = [min(mpmath.mpf(1), max(mpmath.mpf(0), (turn - low) / (high - low))) for turn in turns]
        return [(1 - keep) * f / factor + keep * f for f, keep in zip(frequencies, smooth, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Stretched):
    """LongRoPE (arXiv 2402.13753, Phi-3's "longrope"): a divisor per pair found by search, `long_factor` beyond the trained length.

    cos and sin are multiplied by `sqrt(1 + ln s / ln L0)`, or by `attention_factor`.
    """

    name: ClassVar[str] = "longrope"

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, attention_factor=self.attention_factor)
        for key in ("short_factor", "long_factor"):
            wrong = [value for value in getattr(self, key) if not 0 < value < math.inf]
            if wrong:
                raise UserError(f"longrope.{key} contains {wrong[0]!r}; every divisor must be above 0")

    def spec(self, length: int) -> SchemeSpec:
        """One piece; raises `UserError` if the trained length is not set."""
        self.needs_original_length()
        return super().spec(length)

    def amplitude(self, length: int) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.stretch(length)
        return math.sqrt(1 + math.log(factor) / math.log(self.needs_original_length())) if factor > 1 else 1.0

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters`."""
        values = {**super().to_hf(), "original_max_position_embeddings": self.needs_original_length()}
        values |= {"short_factor": list(self.short_factor), "long_factor": list(self.long_factor)}
        return values if self.attention_factor is None else {**values, "attention_factor": self.attention_factor}

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> LongRope:
        """Reads both lists, `factor` and `attention_factor`."""
        lists = {key: tuple(float(value) for value in parameters[key]) for key in ("short_factor", "long_factor")}
        return cls(factor=parameters.get("factor"), attention_factor=parameters.get("attention_factor"), **lists, **common)

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        key = "long_factor" if length > self.needs_original_length() else "short_factor"
        divisors = getattr(self, key)
        if len(divisors) != len(frequencies):
            raise UserError(f"longrope.{key} has {len(divisors)} values for {len(frequencies)} rotary pairs; give one per pair")
        return [f / mpmath.mpf(divisor) for f, divisor in zip(frequencies, divisors, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(Rope):
    """p-RoPE (arXiv 2410.06205, "proportional" in Hugging Face): the fastest `partial` of all pairs rotate, the rest do not.

    Unlike in partial rotary, the exponent is divided by the whole head dim and pairs span the whole head. `factor` divides all
    frequencies.
    """

    name: ClassVar[str] = "proportional"

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.factor < math.inf:
            raise UserError(f"proportional.factor={self.factor!r} must be at least 1; it is target length / trained length")

    def rotary_dim(self, head_dim: int) -> int:
        """The whole head."""
        if int(self.partial * head_dim // 2) < 1:
            raise UserError(f"proportional.partial={self.partial} leaves no rotating pair in a head of {head_dim} dims; raise it")
        return even_dim(self.name, head_dim, 1.0)

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters`."""
        return {**super().to_hf(), "rope_type": self.name, "factor": self.factor}

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], **common: Any) -> Proportional:
        """Reads `factor`."""
        return cls(factor=parameters.get("factor") or 1.0, **common)

    def _scaled(self, frequencies: list[MpFloat], dim: int, length: int) -> list[MpFloat]:
        turning = int(self.partial * dim // 2)
        return [f / mpmath.mpf(self.factor) if i < turning else mpmath.mpf(0) for i, f in enumerate(frequencies)]
