"""The machines that a plan is for: slices of chips by name."""

from __future__ import annotations

import dataclasses
import math
import re

from lcx.core.chips import CHIPS, Chip
from lcx.core.configs import choice
from lcx.core.errors import UserError


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
        return self.chip.device_flops

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
