"""What a ring and a gather of keys take on a kind of chip, by counted pairs and bytes: by it `auto` chooses between them.

A ring sends keys to the next device while it works on those it has; what is sent for longer than that is waited for. A gather takes
all links of a device at once, so it is shorter, and libtpu computes nothing meanwhile. The rates are a chip's data sheet times what
kernels reach of it (`core.chips`).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from lcx.attention.parallel.balance import Balance, Step, of_layout
from lcx.attention.parallel.documents import Documents
from lcx.attention.parallel.head_groups import HeadGroups, Share
from lcx.attention.parallel.ring import window_hops
from lcx.core.batch import SequenceLayout
from lcx.core.chips import Chip
from lcx.core.mask import Mask

WIDTH = 2
"""Bytes of a number in bfloat16, in which accelerators compute."""

PASSES = ((1.0, 1.0), (2.5, 3.0))
"""Of the forward and the backward pass: the work, in units of the forward pass's, and what is sent, in units of keys and values.
Gradients in float32 come with them on the way back."""

COUNTED = 256
"""Tokens of a device up to which pairs are counted as they are; of more, this many stand for all."""


@dataclasses.dataclass(frozen=True)
class SplitCost:
    """The costs of a layer whose rows are split; `share` is what a device works on."""

    share: Share
    chip: Chip

    @property
    def near(self) -> bool:
        """Whether a ring keeps to fast links: on a TPU within its slice, where meshes keep rows, on a GPU within its host."""
        return self.chip.platform == "tpu" or self.share.ring * self.share.ulysses <= self.chip.per_host

    @property
    def rate(self) -> float:
        """Query-key pairs per second of a device, in all its heads."""
        here, chip = self.share, self.chip
        reached = chip.efficiency.attention_at(here.tokens / here.ulysses)
        return chip.device_flops * reached / (4 * here.rows * here.heads / here.ulysses * here.head_dim)

    @property
    def keys(self) -> float:
        """Bytes of the keys and values of a device, of the heads that it has after an exchange."""
        here = self.share
        _, kv_heads = here.of_group(HeadGroups())
        return 2 * here.rows * here.tokens * kv_heads * here.head_dim * WIDTH

    @property
    def hop(self) -> float:
        """Seconds in which keys and values go to the next device."""
        return self.keys / self.chip.sent(self.near)

    def ring(self, mask: Mask, layout: SequenceLayout) -> float:
        """Seconds of both passes where keys come from one device after another: all of the ring, or those that a window reaches."""
        balance, unit = self._balance(mask, layout)
        pair = unit**2 / self.rate
        return sum(work * pair * balance.time(sent * self.hop / (work * pair)) for work, sent in PASSES)

    def gather(self, mask: Mask, layout: SequenceLayout) -> float:
        """Seconds of both passes where keys are gathered from all devices."""
        balance, unit = self._balance(mask, layout)
        rate = self.chip.gathered(self.share.ring) if self.near else self.chip.sent(near=False)
        gathering = (self.share.ring - 1) * self.keys / rate
        return sum(work * unit**2 * balance.work.max() / self.rate + sent * gathering for work, sent in PASSES)

    def _balance(self, mask: Mask, layout: SequenceLayout) -> tuple[Balance, float]:
        """The work of the devices in steps, and how many tokens one of its tokens stands for."""
        tokens = min(self.share.tokens, COUNTED)
        unit = self.share.tokens / tokens
        window = None if mask.window is None else max(1, round(mask.window / unit))
        return _counted(tokens, self.share.ring, layout, window, mask.causal), unit


@functools.lru_cache(maxsize=64)
def _counted(tokens: int, n: int, layout: SequenceLayout, window: int | None, causal: bool) -> Balance:
    """The balance of a row of one document with `tokens` tokens on each of n devices."""
    if causal:
        return of_layout(Documents(np.asarray([n * tokens]), np.ones(1, np.int64)), layout, n, ((window, 1.0),))
    near = window_hops(Mask(False, window), layout, tokens, n)
    hops = n - 1 if near is None else near.before + near.after
    seen = min(2 * (window or n * tokens) - 1, n * tokens) * tokens
    return Balance(tuple(Step(np.full(n, seen / (hops + 1)), n, float(i > 0)) for i in range(hops + 1)))
