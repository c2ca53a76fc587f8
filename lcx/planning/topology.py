"""The machines that a plan is for: chips by their data sheets, and slices of them by name.

Rates are per second and sizes in bytes, both of one chip unless said otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from lcx.core.configs import choice
from lcx.core.errors import UserError

GiB = 2**30


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


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips: `name` of the chip, `shape` of a slice in chips, how many `slices`."""

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The data sheet."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices of all slices as the compiler counts them: the mesh divides over these."""
        return self.chips * self.chip.cores

    @property
    def memory(self) -> float:
        """Bytes that a program may take on a device."""
        return self.chip.memory / self.chip.cores

    @property
    def flops(self) -> float:
        """Operations per second of a device."""
        return self.chip.flops / self.chip.cores

    @property
    def host(self) -> float:
        """Bytes of host memory for a device."""
        return self.chip.host / self.chip.cores

    @property
    def compiles(self) -> bool:
        """Whether there is a compiler for it that needs no such chip: for TPUs and CPUs."""
        return self.chip.platform != "gpu"

    def __str__(self) -> str:
        text = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices} x {text}"


def topology(text: str, slices: int = 1) -> Topology:
    """The topology that a text such as `v5p:4x4x4`, `v5e:16x16`, `h100:8` or `cpu:8` names.

    Raises `UserError` for a chip that is not known and a shape that its slices do not have.
    """
    name, _, size = text.partition(":")
    choice("--topology", name, CHIPS)
    chip = CHIPS[name]
    example = {3: f"{name}:4x4x4", 2: f"{name}:16x16", 1: f"{name}:8"}[chip.torus]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"--topology={text} names no shape; write it as in {example}")
    shape = tuple(int(number) for number in size.split("x"))
    if len(shape) != chip.torus:
        raise UserError(
            f"--topology={text} has {len(shape)} dimensions, but slices of {name} have {chip.torus}; write it as in {example}"
        )
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1")
    if slices > 1 and chip.platform != "tpu":
        raise UserError(f"--slices={slices} is for TPUs; name all {name} devices in --topology")
    return Topology(name, shape, slices)


def shapes(name: str) -> list[tuple[int, ...]]:
    """Slices of a kind of chip from small to large, as clouds lend them."""
    chip = CHIPS[name]
    if chip.torus == 1:
        return [(2**i,) for i in range(13 if chip.platform == "gpu" else 7)]
    if chip.torus == 2:
        return [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    return [*small, (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16)]
