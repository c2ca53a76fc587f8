"""Chips by their data sheets, and what kernels reach of them.

Rates are per second and sizes in bytes, both of one chip unless said otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Protocol

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of a chip's peak that kernels reach: products with weights and attention, where a device has many tokens of a
    microbatch and where it has few."""

    matmul: float
    attention: float
    matmul_few: float
    attention_few: float

    def matmul_at(self, tokens: float) -> float:
        """The share that products with weights reach, where a device has so many tokens of a microbatch."""
        return _between(self.matmul, self.matmul_few, tokens)

    def attention_at(self, tokens: float) -> float:
        """The share that attention reaches."""
        return _between(self.attention, self.attention_few, tokens)


MANY, FEW = 16_384, 4_096
"""Tokens of a microbatch on a device from which on, and up to which, the efficiencies for many and for few hold."""

TPU = Efficiency(0.627, 0.684, 0.197, 0.304)
WIDE = Efficiency(0.692, 0.345, 0.217, 0.153)
"""Of TPUs, and of those whose matrix units are twice as wide as a head (v6e, tpu7x): what `planning.published.fitted` gives.
For few tokens no row of the latter is published; they lose what the others lose."""

GPU = Efficiency(0.60, 0.35, 0.30, 0.20)
"""Of GPUs: attention as published for Pallas-Triton kernels on an H100 (345 TFLOP/s forward and backward), the others assumed."""

HOST = Efficiency(0.50, 0.25, 0.50, 0.25)
"""Of hosts, assumed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as its data sheet has it.

    `flops`: dense bfloat16 operations. `memory`: what the compiler lets a program take; `bandwidth` of that memory. `link`: one way
    over one link to a neighbour; `torus`: dimensions of the torus of such links (1: every chip reaches every other of its host
    through a switch). `between`: to chips of other slices, or for GPUs of other hosts. `host`: host memory per chip, `host_link`
    one way to it. `per_host`: chips of a host. `cores`: devices that the compiler sees in a chip. `wide`: the matrix unit's
    side, which a head's dimensions fill or not.
    """

    platform: Literal["tpu", "gpu", "cpu"]
    flops: float
    memory: float
    bandwidth: float
    link: float
    torus: int
    between: float
    host: float
    host_link: float
    per_host: int
    cores: int = 1
    wide: int = 128

    @property
    def efficiency(self) -> Efficiency:
        """What its kernels reach."""
        if self.platform == "tpu":
            return WIDE if self.wide > 128 else TPU
        return GPU if self.platform == "gpu" else HOST

    @property
    def device_flops(self) -> float:
        """Dense bfloat16 operations per second of a device."""
        return self.flops / self.cores

    def gathered(self, devices: int) -> float:
        """Bytes per second that a device receives if `devices` gather: from both sides in each dimension of the torus they span."""
        link = self.link / self.cores
        if self.platform != "tpu":
            return link if devices <= self.per_host else self.between
        return 2 * link * min(self.torus, max(1, round(math.log(devices, 4))))

    def sent(self, near: bool) -> float:
        """Bytes per second to the next device of a ring; `near`: all of it is in one slice, or for GPUs on one host."""
        return self.link / self.cores if near else self.between


CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 30.75 * GiB, 1228e9, 45e9, 3, 6.25e9, 100e9, 16e9, 4),
    "v5e": Chip("tpu", 197e12, 15.75 * GiB, 819e9, 45e9, 2, 3.1e9, 48e9, 16e9, 4),
    "v5p": Chip("tpu", 459e12, 95.74 * GiB, 2765e9, 90e9, 3, 6.25e9, 112e9, 16e9, 4),
    "v6e": Chip("tpu", 918e12, 31.25 * GiB, 1640e9, 90e9, 2, 12.5e9, 180e9, 32e9, 4, wide=256),
    "tpu7x": Chip("tpu", 2307e12, 189.5 * GiB, 7380e9, 100e9, 3, 12.5e9, 240e9, 32e9, 4, cores=2, wide=256),
    "a100": Chip("gpu", 312e12, 78 * GiB, 2039e9, 300e9, 1, 25e9, 125e9, 25e9, 8),
    "l40s": Chip("gpu", 362e12, 46 * GiB, 864e9, 25e9, 1, 6.25e9, 64e9, 25e9, 8),
    "h100": Chip("gpu", 989e12, 78 * GiB, 3350e9, 450e9, 1, 50e9, 250e9, 50e9, 8),
    "h200": Chip("gpu", 989e12, 139 * GiB, 4800e9, 450e9, 1, 50e9, 250e9, 50e9, 8),
    "b200": Chip("gpu", 2250e12, 178 * GiB, 8000e9, 900e9, 1, 50e9, 250e9, 50e9, 8),
    "cpu": Chip("cpu", 5e10, 4 * GiB, 20e9, 5e9, 1, 1e9, 0.0, 5e9, 1),
}
"""Chips by the names that libtpu and vendors use. Google's documentation of TPU versions (links by "How to Scale Your
Model", Google DeepMind 2025: one way, with both ways at once), NVIDIA's data sheets. `memory` is what libtpu 0.0.42 allows a
program, for GPUs 97% of the sheet's. A CPU stands for one device of a host whose memory is read when the plan is made."""


KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100": "a100",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Chips by how JAX's names of their devices begin (`device_kind`)."""


USUAL = {"tpu": "v5p", "gpu": "h100"}
"""The chip of a platform that stands for those without an entry; a CPU's for all other platforms."""


class Device(Protocol):
    """What a device of JAX says of itself, one that is here or one of a mesh to compile for."""

    device_kind: str
    platform: str


def known_chip(device: Device) -> Chip | None:
    """The chip of a device; None for a kind without an entry."""
    kinds = sorted((kind for kind in KINDS if device.device_kind.startswith(kind)), key=len)
    return CHIPS[KINDS[kinds[-1]]] if kinds else None


def chip_of(device: Device) -> Chip:
    """The chip of a device, or a usual one of its platform."""
    return known_chip(device) or CHIPS[USUAL.get(device.platform, "cpu")]


def _between(many: float, few: float, tokens: float) -> float:
    """`many` from `MANY` tokens on, `few` up to `FEW`, straight over their logarithm between."""
    share = min(1.0, max(0.0, math.log(MANY / max(tokens, 1.0)) / math.log(MANY / FEW)))
    return many ** (1 - share) * few**share
