"""The static descriptions of attention: of a layer, as a model asks for it, and of one kernel call, as a kernel takes it.

Legend: N heads, K KV heads, G = N/K.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.core.mask import Mask
from lcx.positions.scheme import BiasFn, Layout, Region, SchemeSpec

Platform = Literal["tpu", "gpu"]
Strategy = Literal["ring", "gather", "window", "nested"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static tile sizes: `q` queries by `k` keys, for `rows` batch rows and `heads` KV heads (and their G query heads) at once."""

    q: int
    k: int
    rows: int = 1
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """All that is static about one kernel call; every kernel takes it whole and reads what it needs.

    logits = cap(scale · q·k) + bias under `mask`, cap(x) = softcap · tanh(x / softcap). `blocks` are the tiles of blockwise and
    flash; `tile_dtype` is the dtype in which blockwise multiplies tiles, and flat values, `out_dtype` that of o (None: q's).
    `platform` selects the flash kernel; `interpret` interprets it without such a device, for tests.
    """

    mask: Mask
    scale: float
    softcap: float | None = None
    bias: BiasFn | None = None
    blocks: Blocks | None = None
    tile_dtype: Any = None
    out_dtype: Any = None
    kernel: str = "dense"
    platform: str = "tpu"
    interpret: bool = False

    @property
    def tiles(self) -> Blocks:
        """`blocks` of a kernel that works in tiles, which is never without."""
        assert self.blocks is not None
        return self.blocks

    @property
    def wide(self) -> Any:
        """The dtype in which blockwise sums: float32 or wider."""
        return jnp.promote_types(self.tile_dtype, jnp.float32)

    @property
    def prescaled(self) -> bool:
        """Whether to multiply q by the scale, where that costs no precision; otherwise every tile of logits is read once more."""
        return self.tile_dtype == self.wide

    @property
    def exponent_scale(self) -> float:
        """What tiles of logits are multiplied by inside the exponential: the scale, if nothing before needs it in them.

        A pass over a tile to scale it costs as much as one that takes its exponential.
        """
        return 1.0 if self.prescaled or self.softcap is not None or self.bias is not None else self.scale

    @property
    def rounds_exp(self) -> bool:
        """Whether probabilities are rounded as they are computed: on a CPU that multiplies tiles in bfloat16."""
        return self.platform == "cpu" and self.tile_dtype == jnp.bfloat16

    def with_dtypes(self, dtype: Any) -> KernelSpec:
        """The same with dtypes that are not given taken from q's."""
        return dataclasses.replace(
            self, tile_dtype=jnp.dtype(self.tile_dtype or dtype), out_dtype=jnp.dtype(self.out_dtype or dtype)
        )


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """All that is static about attention on one device: the kernel, and the scheme's regions and rotary layout."""

    kernel: KernelSpec
    regions: tuple[Region, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static description of one kind of layer. `kernel` is a key of `attention.shard.KERNELS`, or "auto"; `block_q` and `block_k`
    override the chosen tile sizes, `strategy` and `head_groups` what is chosen for a sequence that is split over the mesh.
    `interpret` names the platform whose flash kernel is interpreted without such a device, for tests."""

    mask: Mask
    scheme: SchemeSpec
    scale: float
    softcap: float | None = None
    kernel: str = "auto"
    block_q: int | None = None
    block_k: int | None = None
    strategy: Strategy | Literal["auto"] = "auto"
    head_groups: int | None = None
    interpret: Platform | None = None

    def __post_init__(self) -> None:
        choice("context strategy", self.strategy, ("auto", *get_args(Strategy)))
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UserError(f"{name}={size} must be at least 1")
