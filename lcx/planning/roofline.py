"""How long a step takes and what bounds it: the work of each part over the rates of a chip, and transfers behind or after it.

Rates are a chip's peaks times an efficiency for each class of kernel (`core.chips`). Those of TPUs are set from published rows
(`published.py`), none of which was measured with lcx.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lcx.core.chips import Efficiency
from lcx.core.mesh import slices_spanned
from lcx.model.config import is_local
from lcx.planning.topology import Topology
from lcx.planning.work import WIDTH, Work, useful


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a step: seconds that it computes and that it sends, how often it comes, and whether both go on at once."""

    name: str
    part: str
    compute: float
    transfer: float
    times: int
    overlapped: bool = True

    @property
    def seconds(self) -> float:
        """All its times together."""
        return self.times * (max(self.compute, self.transfer) if self.overlapped else self.compute + self.transfer)

    @property
    def exposed(self) -> float:
        """Of these, seconds in which nothing is computed."""
        return self.seconds - self.times * self.compute


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step's segments in the order in which they come, each with all its times."""

    segments: tuple[Segment, ...]
    useful: float
    peak: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(one.seconds for one in self.segments)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.useful / self.seconds / self.peak

    @property
    def by_part(self) -> dict[str, float]:
        """Seconds by part, what is only sent under `transfers`, the largest first."""
        found: dict[str, float] = {}
        for one in self.segments:
            found[one.part] = found.get(one.part, 0.0) + one.times * one.compute
            found["transfers"] = found.get("transfers", 0.0) + one.exposed
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def bound(self) -> str:
        """What takes most of the step."""
        return next(iter(self.by_part))


def step_time(work: Work, where: Topology, reached: Efficiency | None = None) -> StepTime:
    """The time of a step, by the work of its parts."""
    reached = reached or where.chip.efficiency
    rates = Rates(work, where, reached)
    layers = [one for kind in work.model.kinds for one in _layers(work, kind, rates)]
    forward = [one for one in layers if one.name.startswith("forward")]
    backward = [one for one in layers if one.name.startswith("backward")]
    logits = work.logits / rates.matmul
    loss = Segment(
        "loss", "loss", 4 * logits, 4 * rates.gathered(work.model.model_dim * work.model.vocab_size * WIDTH), work.accumulate
    )
    numbers = num_weights(work) / (work.weights * work.mesh["tensor"] * work.mesh["expert"])
    update = Segment(
        "optimizer", "optimizer", UPDATE * numbers / where.chip.bandwidth * where.chip.cores, rates.summed(numbers), 1, False
    )
    return StepTime((*forward, loss, *backward, update), useful(work), where.flops)


UPDATE = 40
"""Bytes that an update moves for a number: weight, two moments and gradient read in float32, three of them written, a cast."""


class Rates:
    """What a device reaches: operations per second by class, and seconds of its transfers."""

    def __init__(self, work: Work, where: Topology, reached: Efficiency):
        self.work, self.where = work, where
        self.matmul = where.flops * reached.matmul_at(work.at_once)
        self.attention = where.flops * reached.attention_at(work.at_once)
        self.spanned = slices_spanned(work.mesh, where.slices, True)
        """Slices that each axis goes over."""

    def gathered(self, size: float) -> float:
        """Seconds in which a weight of `size` bytes is gathered from all its shards, or its gradient is summed into them."""
        if self.work.weights == 1:
            return 0.0
        inside = size * (1 - 1 / self.work.weights) / self.where.chip.gathered(self.work.weights)
        # What other slices hold comes over the network, to each chip of a slice a part of it.
        missing = size * (1 - 1 / self.spanned["fsdp"]) * self.where.slices / self.where.chips
        return inside + missing / self.where.chip.between

    def hop(self, size: float) -> float:
        """Seconds in which `size` bytes go to the next device of a ring."""
        chip = self.where.chip
        near = self.spanned["ring"] == 1 if chip.platform == "tpu" else self.work.share <= chip.per_host
        return size / chip.sent(near)

    def exchanged(self, size: float, devices: int) -> float:
        """Seconds in which a device trades all but its part of `size` bytes with others: on a torus a quarter of gathering them."""
        if devices == 1:
            return 0.0
        if self.where.chip.platform == "tpu":
            return size * devices / 4 / self.where.chip.gathered(devices)
        return size * (1 - 1 / devices) / self.where.chip.gathered(devices)

    def summed(self, numbers: float) -> float:
        """Seconds in which gradients of so many numbers are summed over `data`, and over slices."""
        size, copies, seconds = 4 * numbers, self.work.mesh["data"], 0.0
        if self.where.slices > 1:
            seconds += 2 * size / self.where.chip.between * self.where.chip.cores
            copies //= self.spanned["data"]
        if copies > 1:
            seconds += 2 * size / self.where.chip.gathered(copies)
        return seconds


def _layers(work: Work, kind: str, rates: Rates) -> list[Segment]:
    """The segments of all layers of a kind, forward and backward."""
    again, attended_again = work.recomputes
    count = work.model.layer_kinds.count(kind) * work.accumulate
    dense, weights = work.dense / rates.matmul, rates.gathered(work.layer_weights * WIDTH)
    fetch = _fetching(work, kind, rates)
    summed = 4 * work.tokens * work.model.model_dim * WIDTH
    tensor = summed / rates.where.chip.gathered(work.mesh["tensor"]) if work.mesh["tensor"] > 1 else 0.0
    seconds = work.attention(kind) / rates.attention
    attend, pull = _attention(work, kind, rates, seconds, 1), _attention(work, kind, rates, 2.5 * seconds, 3)
    # The backward pass reads gradients in float32 besides keys, and writes them.
    attend, pull = (attend[0], attend[1] + fetch), (pull[0], pull[1] + fetch * (1 + 2 * 4 / WIDTH))
    trade = rates.exchanged(work.exchanged, work.mesh["ulysses"])
    local = is_local(kind)
    kv = 0.0 if local or work.strategy != "gather" or work.mesh["ring"] == 1 else _gathering(work, rates)
    ahead, kv = (kv, 0.0) if work.gathers_ahead else (0.0, kv)
    sent = 2 * WIDTH * work.tokens * work.model.model_dim if work.policy.endswith("offload") else 0.0
    offload = sent / rates.where.chip.host_link
    segments = [
        Segment("forward products", "products", dense, weights + ahead + offload, count),
        Segment("forward attention", "attention", *attend, count),
        Segment("backward products", "products", 2 * dense + work.redone / rates.matmul, 2 * weights + 2 * ahead + offload, count),
        Segment("backward attention", "attention", *pull, count),
    ]
    if work.chunk is not None:
        segments.append(Segment("forward products of the first walk", "products", dense, weights, count))
        segments.append(Segment("forward attention of the first walk", "attention", *attend, count))
    if attended_again:
        segments.append(Segment("backward attention again", "attention", *attend, count))
    if kv:
        # libtpu computes nothing while keys are gathered in slices, nor while their gradients, in float32, are summed.
        segments.append(Segment("forward gathering of keys", "transfers", 0.0, kv, count))
        segments.append(Segment("backward gathering of keys", "transfers", 0.0, kv * (3 + attended_again), count))
    if trade:
        segments.append(Segment("forward exchange of heads", "transfers", 0.0, trade, count))
        segments.append(Segment("backward exchange of heads", "transfers", 0.0, trade * (2 if attended_again else 1), count))
    if tensor:
        segments.append(Segment("forward sums over tensor", "transfers", 0.0, tensor, count))
        segments.append(Segment("backward sums over tensor", "transfers", 0.0, tensor * (2 if again else 1), count))
    return segments


def _attention(work: Work, kind: str, rates: Rates, seconds: float, carried: int) -> tuple[float, float]:
    """Seconds of a layer's attention and of its ring; `carried`: what travels, in units of its keys and values in bfloat16."""
    ring = work.mesh["ring"]
    if ring == 1 or work.strategy != "ring":
        return seconds, 0.0
    hops = ring - 1
    if is_local(kind):
        piece = max(1, work.length // ring)
        hops = min(hops, math.ceil((work.model.window or 1) / piece))
    return seconds, hops * rates.hop(carried * work.keys)


def _fetching(work: Work, kind: str, rates: Rates) -> float:
    """Seconds in which a layer's keys and values come from the host, chunk by chunk for each chunk of queries."""
    return 0.0 if rates.where.chip.platform == "cpu" else WIDTH * work.fetched(kind) / rates.where.chip.host_link


def _gathering(work: Work, rates: Rates) -> float:
    ring = work.mesh["ring"]
    return work.keys * (ring - 1) / rates.where.chip.gathered(ring)


def num_weights(work: Work) -> float:
    """Numbers in the weights of the whole model."""
    model = work.model
    layer = work.layer_weights * work.mesh["tensor"] * work.mesh["expert"]
    return model.num_layers * layer + model.model_dim * model.vocab_size * (1 if model.tied_embeddings else 2)


def cost(times: Mapping[str, float], steps: Mapping[str, int], chips: int) -> tuple[float, float]:
    """Hours and chip-hours of stages, by the seconds of their steps and how many there are."""
    hours = sum(times[name] * steps[name] for name in times) / 3600
    return hours, hours * chips


def exposed(segments: Sequence[Segment]) -> float:
    """Seconds in which devices only send."""
    return sum(one.exposed for one in segments)
