"""Slices of TPUs as Google Cloud names them: chips, hosts, accelerator types and node labels."""

from __future__ import annotations

import dataclasses
import math
import re

from lcx.core.chips import CHIPS
from lcx.core.configs import choice
from lcx.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    `label` is the value of GKE's node label, `prefix` begins the accelerator type of a TPU VM, which counts `counted` cores a chip
    (None: no TPU VMs of this kind), `runtime` is the usual software version of such a VM. A topology has `dimensions` numbers.
    `whole_hosts` are slices on one host of as many chips.
    """

    label: str
    prefix: str | None
    counted: int
    runtime: str
    dimensions: int
    whole_hosts: tuple[str, ...]


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base", 3, ()),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", 2, ("1x1", "2x2", "2x4")),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", 3, ()),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", 2, ("1x1", "2x2", "2x4")),
    "tpu7x": Generation("tpu7x", None, 2, "", 3, ()),
}
"""Names and sizes as in the documentation of Cloud TPU and of TPUs in GKE (read November 2026)."""

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""The topologies of TPUs with two dimensions."""

CHIPS_PER_HOST = 4
"""Of slices of several hosts, and of every host of a TPU with three dimensions."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: `kind`, a key of `GENERATIONS`, in a `topology` such as 4x4."""

    kind: str
    topology: str

    def __post_init__(self) -> None:
        generation = GENERATIONS[choice("--tpu", self.kind, GENERATIONS)]
        sizes = re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", self.topology)
        if sizes is None or self.topology.count("x") + 1 != generation.dimensions:
            example = "4x4" if generation.dimensions == 2 else "2x2x2"
            raise UserError(
                f"--topology={self.topology} does not fit --tpu={self.kind}, whose topologies have {generation.dimensions} "
                f"numbers, as in {example}"
            )
        if generation.dimensions == 2 and self.topology not in FLAT:
            raise UserError(f"--topology={self.topology} is none of --tpu={self.kind}; it has {', '.join(FLAT)}")
        if generation.dimensions == 3 and self.chips % CHIPS_PER_HOST:
            raise UserError(
                f"--topology={self.topology} has {self.chips} chips, which do not divide into hosts of {CHIPS_PER_HOST}; the "
                "smallest is 2x2x1"
            )

    @property
    def generation(self) -> Generation:
        """The kind's row of `GENERATIONS`."""
        return GENERATIONS[self.kind]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(int(size) for size in self.topology.split("x"))

    @property
    def devices(self) -> int:
        """Devices of the slice as JAX counts them."""
        return self.chips * CHIPS[self.kind].cores

    @property
    def hosts(self) -> int:
        """Hosts of the slice, which are its processes."""
        return 1 if self.topology in self.generation.whole_hosts else self.chips // CHIPS_PER_HOST

    @property
    def chips_per_host(self) -> int:
        """Chips that each host sees."""
        return self.chips // self.hosts

    @property
    def accelerator_type(self) -> str:
        """The name of a TPU VM with this slice; raises `UserError` for kinds that only GKE has."""
        if self.generation.prefix is None:
            raise UserError(f"--tpu={self.kind} has no TPU VMs; use --backend=gke")
        return f"{self.generation.prefix}-{self.chips * self.generation.counted}"
