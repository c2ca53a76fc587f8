"""xPos: rotary embedding whose scores decay with distance, fast pairs first."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.positions.rotary import Rope
from lcx.positions.scheme import Heads, Region, SchemeSpec

SPAN = 80.0
"""Largest exponent allowed in a score: float32 and bfloat16 overflow at e**88."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xpos(Rope):
    """xPos (arXiv 2212.10554): queries times `zeta ** (m / scale_base)`, keys times `zeta ** (-n / scale_base)`.

    `zeta_i = (2i / d + gamma) / (1 + gamma)`. The powers are centred on half the declared length, which leaves every product
    unchanged. Keys *after* a query grow, so lengths at which they would overflow are refused: about 32K tokens at a scale base
    of 512, a million at 16,400.
    """

    name: ClassVar[str] = "xpos"

    gamma: float = 0.4
    scale_base: float = 512.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, gamma=self.gamma, scale_base=self.scale_base)

    def spec(self, length: int) -> SchemeSpec:
        """One region with a rotation per side; raises `UserError` if float32 would overflow."""
        steepest = -math.log(self.gamma / (1 + self.gamma))
        if steepest * length / self.scale_base > SPAN:
            raise UserError(
                f"xpos.scale_base={self.scale_base:g} overflows float32 at length {length}; raise it to "
                f"{math.ceil(steepest * length / SPAN)} or stay within {int(SPAN * self.scale_base / steepest)} tokens"
            )
        return SchemeSpec(regions=(Region("query", "key"),), layout=self.layout, query_scale=self._query_scale(length))

    def buffers(self, heads: Heads, length: int) -> dict[str, Any]:
        """Two rotations, `query` and `key`, that grow in opposite directions."""
        dim = self.rotary_dim(heads.head_dim)
        log_zeta = [math.log((2 * i / dim + self.gamma) / (1 + self.gamma)) / self.scale_base for i in range(dim // 2)]
        growth, center = np.asarray(log_zeta, np.float32), np.asarray(length / 2, np.float32)
        rotations = {
            "query": self.rotation(heads, length, growth=growth, center=center),
            "key": self.rotation(heads, length, growth=-growth, center=center),
        }
        return {**super(Rope, self).buffers(heads, length), "rotations": rotations}

    def to_hf(self) -> dict[str, Any]:
        """Raises `UserError`: Hugging Face has no such rope type."""
        raise UserError("xpos has no Hugging Face rope_type; export a scheme without decay")
