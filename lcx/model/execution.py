"""How a model is computed, apart from what it is: the same weights mean the same model under every setting."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from lcx.attention.shard import KERNELS
from lcx.core.configs import choice, positive
from lcx.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """Precision, kernels, and what is traded between memory, time and communication."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "auto"
    """The kernel: a key of `attention.shard.KERNELS`, or `auto`, for which `attention.plan` decides by size and platform."""
    context_strategy: Literal["auto", "ring", "gather"] = "auto"
    """How the devices that share a sequence access each other's keys (`attention.parallel.context`). `auto`: whichever of a ring,
    a window's neighbours and a gather takes least time on the chip (`attention.parallel.cost`)."""
    context_layout: Literal["auto", "contiguous", "zigzag", "striped", "balanced"] = "auto"
    """How the tokens of a row are distributed over those devices. `balanced`: in training, by the documents of each row, so that
    all devices work equally much and few keys travel; else as `auto`. `auto`: zigzag, or contiguous if all layers are local; or
    balanced for a stage whose documents make that slower by more than 5% (`attention.parallel.balance`)."""
    expert_matmul: Literal["auto", "ragged", "dense"] = "auto"
    """How tokens are matched with their experts; none is ever dropped. `ragged`: sorted by expert, in one grouped product. `dense`:
    every expert runs over every token. `auto`: dense on a CPU, which has no grouped product, otherwise ragged."""
    head_groups: int | None = None
    """In how many groups, one after another, the heads attend where a row is split over devices: buffers and transfers are that
    much smaller. None: by size (`attention.parallel.head_groups`)."""
    remat: Literal["auto", "none", "attention", "dots", "block", "offload", "nested", "nested_offload"] = "auto"
    """What a layer keeps for its backward pass; the rest is recomputed. `none`: everything. `attention`: its input and the output
    of attention, at the price of four small matrix products. `dots`: the results of products with weights. `block`: its input.
    `offload`: like `attention`, but in host memory, from which the backward pass fetches it (on a CPU that is the same memory).
    `nested`: of `remat_every` periods of layers, only the first one's input; the backward pass recomputes these periods and keeps
    of them what `attention` does, so that of L layers about sqrt(8·L) arrays are held instead of L, and attention is computed as
    often as with `block`. `nested_offload`: all of that in host memory. `auto`: attention if a row has at least 8,192 tokens,
    otherwise none."""
    remat_every: int | None = None
    """Periods of layers that `nested` recomputes together. None: as many as make it hold least."""
    recurrent_chunk: int | None = None
    """Tokens of a chunk in which one device walks a longer row, forward and backward (`model.recurrent`): activations do not grow
    with the row. Exact, at the price of one more forward pass. Keys, values and their gradients are in the host's memory. Rows of
    at most so many tokens are computed at once. None: whole rows."""
    layer_unroll: int | None = None
    """Periods of the pattern per iteration of the scan over layers. None: up to 8 on a CPU, where every iteration copies its
    weights and activations (a step of 4 layers takes a quarter less time), unless `remat` recomputes anything; otherwise 1, which
    compiles fastest."""
    mlp_tile: int | None = 4096
    """Tokens of a device's part of a row that go through the feed-forward layer at once; longer parts are processed tile by tile,
    and the backward pass recomputes a tile's two wide products instead of keeping them (Arctic, arXiv 2506.13996). Where a row is
    split over devices and `remat` recomputes, norms and projections go through the same tiles. On a CPU tiles are smaller if the
    layer is wide, so that they fit into its cache. None: always whole rows."""
    loss_tile: int = 1 << 25
    """Maximum number of logits on a device at once during the loss; vocabulary, and tokens of long rows, are cut to stay below."""

    def __post_init__(self) -> None:
        choice("execution.attention", self.attention, ("auto", *KERNELS))
        sizes = ("head_groups", "remat_every", "recurrent_chunk", "layer_unroll", "mlp_tile", "loss_tile")
        positive("execution", **{name: getattr(self, name) for name in sizes})
        if self.remat_every is not None and not self.nested:
            raise UserError(
                f"execution.remat_every={self.remat_every} is for execution.remat=nested, and that is {self.remat}; set it, or "
                "leave remat_every out"
            )

    @property
    def nested(self) -> bool:
        """Whether periods of layers are recomputed several at a time."""
        return self.remat.startswith("nested")

    def at_once(self, length: int) -> int:
        """Tokens of rows of `length` that go through the layers at once: all, or those of a chunk (`recurrent_chunk`)."""
        return length if self.recurrent_chunk is None else min(length, self.recurrent_chunk)

    def periods_together(self, periods: int) -> int:
        """How many of a model's `periods` of layers `nested` recomputes together; 1 for every other policy."""
        if not self.nested:
            return 1
        held = {size: periods // size + periods % size * 2 + 2 * size for size in range(1, periods + 1)}
        return min(self.remat_every or min(held, key=lambda size: held[size]), periods)


FIELDS = frozenset(field.name for field in dataclasses.fields(ExecutionConfig))


def refuse_moved(*paths: str) -> None:
    """Raises `UserError` for a path such as config.model.remat, where lcx 0.1 had what is a field of `ExecutionConfig` now."""
    for path in paths:
        found = re.fullmatch(r"(|config\.|--config\.)model\.(\w+)", path)
        if found and found[2] in FIELDS:
            raise UserError(f"{path} has moved; set {found[1]}execution.{found[2]} instead")
