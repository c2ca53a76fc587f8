"""How many heads attend at a time where a sequence is split over devices: what attention lays out and sends is that much smaller.

Groups of KV heads go one after another, each with its queries, and are exchanged one after another (UPipe, arXiv 2602.21196).
Where all KV heads of a device are needed at once, as with as many devices as KV heads, groups of each one's query heads follow
one another over keys that are exchanged once.

Legend: N heads, K KV heads, G = N / K, u devices that trade tokens for heads.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from lcx.attention.parallel.ring import RingSchedule
from lcx.attention.parallel.ulysses import kv_copies
from lcx.core.errors import UserError

CPU_HOP = 2**21
"""Logits of a hop down to which host devices process fewer heads at a time: they share their memory, so savings count for all
of them."""

GROUP_NUMBERS = 2**27
"""Numbers of the queries of a device, in all heads, from which an accelerator processes fewer heads at a time: 512 MiB for each of
the float32 accumulators of a group. A hop of a group of that size still computes far longer than its transfers take."""


class HeadGroups(NamedTuple):
    """`kv` groups of the KV heads, and `queries` groups of the query heads of each KV head."""

    kv: int = 1
    queries: int = 1

    @property
    def count(self) -> int:
        """Number of groups in all."""
        return self.kv * self.queries


@dataclasses.dataclass(frozen=True)
class Share:
    """What a device of a split sequence works on: `rows` of `tokens` tokens once keys have come together, and of its mesh's other
    axes' share `heads`, `kv_heads` of `head_dim`, before the exchange over `ulysses` devices. `ring` devices send keys around."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    ulysses: int
    ring: int

    def possible(self) -> list[HeadGroups]:
        """All ways to group the heads, those in fewer groups first, and of as many those that divide KV heads first."""
        K, G, u = self.kv_heads, self.heads // self.kv_heads, self.ulysses
        found = [HeadGroups(kv) for kv in range(1, K + 1) if K % kv == 0 and (kv == 1 or K // kv % u == 0)]
        if self.ring == 1:
            # Around a ring keys would have to travel once for each group of queries.
            last, copies = found[-1].kv, kv_copies(K, u)
            found += [HeadGroups(last, n) for n in range(2, G + 1) if G % n == 0 and G // n % copies == 0]
        return found

    def of_group(self, groups: HeadGroups) -> tuple[int, int]:
        """Heads and KV heads with which a kernel is called, once for each group."""
        kv_heads = self.kv_heads // groups.kv
        return self.heads // groups.count // self.ulysses, kv_heads * kv_copies(kv_heads, self.ulysses) // self.ulysses


def choose_groups(share: Share, platform: str, strategy: str, biased: bool, asked: int | None) -> HeadGroups:
    """The groups for a platform: as many as `asked`, or by size. With a bias, which is computed for all heads at once, one.

    Raises `UserError` if the heads cannot be grouped as asked.
    """
    possible = [HeadGroups()] if biased else share.possible()
    if asked is not None:
        fits = [groups for groups in possible if groups.count == asked]
        if not fits:
            counts = [groups.count for groups in possible]
            sizes = (
                f"a ring of {share.ring} with mesh.ulysses={share.ulysses} has {share.heads} heads and {share.kv_heads} KV heads"
            )
            why = "a positional bias is computed for all heads at once" if biased else sizes
            raise UserError(f"execution.head_groups={asked} does not fit, as {why}; use one of {counts}, or None")
        return fits[0]
    if platform == "cpu":
        if share.ring == 1 or strategy == "gather":
            return HeadGroups()
        # After the exchange, as many KV heads as devices are left to be processed at once.
        here = share.heads // share.ulysses
        logits = share.rows * share.tokens**2 * here
        return max((g for g in possible if logits // g.count >= CPU_HOP), key=lambda g: g.count, default=HeadGroups())
    numbers = share.rows * share.tokens * (share.heads // share.ulysses) * share.head_dim
    return next((g for g in possible if numbers // g.count <= GROUP_NUMBERS), possible[-1])


def host_schedule(schedule: RingSchedule, groups: HeadGroups, biased: bool, tokens: int) -> RingSchedule:
    """How host devices walk a ring: by halves of the keys if there is a bias, or if no other device has keys."""
    halves = groups.count == 1 and (biased or not schedule.before + schedule.after) and tokens % 2 == 0
    return dataclasses.replace(schedule, slices=2) if halves else schedule
