"""Steps whose times others have published: some set the efficiencies of `roofline.py`, the others test it. None is of lcx.

Sources: MaxText pull requests 4687 and the context-parallel sweep of its documentation on 64 v5p chips; Google's tpu-recipes,
training/ironwood/README.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from lcx.core.chips import Efficiency
from lcx.model.config import ModelConfig
from lcx.model.presets import family
from lcx.planning.roofline import step_time
from lcx.planning.topology import Topology, topology
from lcx.planning.work import Work

EIGHT = family("llama3_8b").model
SEVEN = family("llama2_7b").model
SEVENTY = dataclasses.replace(EIGHT, model_dim=8192, num_layers=80, num_heads=64, mlp_dim=28672)


@dataclasses.dataclass(frozen=True)
class Row:
    """A published step: `seconds` of it over `where`, with `rows` rows in all.

    `sets` names the efficiencies that it helps to set; a row without any is a test. `float8`: its products with weights are in
    float8, at twice the rate.
    """

    name: str
    model: ModelConfig
    length: int
    rows: float
    where: Topology
    strategy: str
    mesh: dict[str, int]
    seconds: float
    source: str
    sets: tuple[str, ...] = ()
    float8: bool = False

    def work(self) -> Work:
        """What its devices have to do; layers keep their input and what attention gives, as far as is known."""
        mesh = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "ring": 1, "ulysses": 1, **self.mesh}
        rows = self.rows / (mesh["data"] * mesh["fsdp"])
        return Work(self.model, rows, self.length, mesh, 1, "attention", self.strategy, gathers_ahead=True)

    def predicted(self, reached: Efficiency | None = None) -> float:
        """Seconds by the roofline."""
        reached = reached or self.where.chip.efficiency
        if self.float8:
            reached = dataclasses.replace(reached, matmul=2 * reached.matmul, matmul_few=2 * reached.matmul_few)
        return step_time(self.work(), self.where, reached).seconds


V5P, IRONWOOD = topology("v5p:4x4x4"), topology("tpu7x:4x8x8")
CP = "MaxText's table, Llama 3 8B, CP 64, load-balanced"
RECIPE = "tpu-recipes, Ironwood"


def _eight(name: str, strategy: str, mesh: dict[str, int], seconds: tuple[float, float, float], **options: Any) -> list[Row]:
    lengths = zip((65536, 131072, 262144), seconds, strict=True)
    return [Row(f"8B {name} {n // 1024}K", EIGHT, n, 1, V5P, strategy, mesh, s, CP, **options) for n, s in lengths]


def _seven(strategy: str, mesh: dict[str, int], seconds: float, **options: Any) -> Row:
    name = "Ulysses" if mesh.get("ulysses") else {"gather": "all-gather", "ring": "ring"}[strategy]
    return Row(f"7B {name} 32K", SEVEN, 32768, 64, V5P, strategy, {"fsdp": 4, **mesh}, seconds, "MaxText PR 4687", **options)


def _utilised(
    model: ModelConfig, length: int, rows: float, where: Topology, mesh: dict[str, int], rate: float, **options: Any
) -> Row:
    """A row of which operations per second and chip are published, with causal attention counted half."""
    row = Row(model=model, length=length, rows=rows, where=where, mesh=mesh, strategy="gather", seconds=1.0, **options)
    useful = step_time(row.work(), where).useful * where.chip.cores
    return dataclasses.replace(row, seconds=useful / rate)


ROWS: tuple[Row, ...] = (
    _seven("gather", {"ring": 16}, 8.83, sets=("matmul", "attention")),
    _utilised(
        EIGHT, 65536, 16, V5P, {"fsdp": 16, "ulysses": 4}, 243e12, name="8B Ulysses 64K", source="MaxText PR 4687",
        sets=("matmul", "attention"),
    ),
    *_eight("all-gather", "gather", {"ring": 64}, (1.09, 2.98, 9.71), sets=("matmul_few", "attention_few")),
    _utilised(
        SEVENTY, 8192, 1024, IRONWOOD, {"fsdp": 512}, 1207e12, name="70B 8K", source=RECIPE, sets=("matmul",)
    ),
    Row("70B 128K float8", SEVENTY, 131072, 64, IRONWOOD, "gather", {"fsdp": 64, "ring": 8}, 30.1, RECIPE, ("attention",), True),
    Row("70B 128K", SEVENTY, 131072, 64, IRONWOOD, "gather", {"fsdp": 64, "ring": 8}, 34.0, RECIPE),
    *_eight("usp 16x4", "gather", {"ring": 16, "ulysses": 4}, (1.04, 2.88, 9.50)),
    *_eight("usp 8x8", "gather", {"ring": 8, "ulysses": 8}, (1.20, 2.93, 9.34)),
    _seven("gather", {"ulysses": 16}, 8.90),
    _seven("ring", {"ring": 16}, 16.38),
)  # fmt: skip


def fitted(start: Efficiency, rows: Sequence[Row]) -> Efficiency:
    """The efficiencies with which the rows that set any come nearest to what is published, by least squares of the logarithms."""
    setting = [row for row in rows if row.sets]
    names = sorted({name for row in setting for name in row.sets})

    def at(values: np.ndarray) -> Efficiency:
        return dataclasses.replace(start, **dict(zip(names, np.exp(values).tolist(), strict=True)))

    def misses(values: np.ndarray) -> list[float]:
        return [float(np.log(row.predicted(at(values)) / row.seconds)) for row in setting]

    return at(least_squares(misses, np.log([getattr(start, name) for name in names])).x)
