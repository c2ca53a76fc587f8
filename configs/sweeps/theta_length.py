"""Which theta does a longer context need? Thetas around the critical base of three lengths, a short extension with each.

Command:  make quickstart      (the points start from its base stage, in runs/quickstart)
          lcx sweep --config=configs/sweeps/theta_length.py --workdir=runs/theta_length
Hardware: 2 CPU cores.
Time:     8.5 minutes, 18 points of 14 to 71 seconds.
Result:   92 to 94% of needles at the critical base of every length, next to none at a fiftieth (experiments/001_theta_length).
"""

import runpy
from pathlib import Path

from lcx.positions.theta import critical_base, ladder
from lcx.recipes.sweeps import chain, param, prod

QUICKSTART = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))
LENGTHS = (1024, 2048, 4096)
MULTIPLES = (0.02, 0.5, 1.0, 2.0)
"""Of the critical base of a length. With them go the NTK-aware base, about a quarter of it, and the base model's own theta."""


def get_config():
    """The base of every point. Batch and needles follow the length."""
    config = QUICKSTART["from_base"](LENGTHS[:1], seq_len=LENGTHS[0], batch_size=8)
    extend = config.stages.extend
    extend.positions = {"default": critical_base(QUICKSTART["BASE_THETA"], QUICKSTART["BASE_LENGTH"], LENGTHS[0])}
    length = extend.get_ref("seq_len")
    needles = length // 128
    extend.batch_size = 8192 // length
    extend.parts = {"needles": {"task": {"needles": needles, "queries": needles}}}
    return config


def get_sweep():
    """The thetas of each length, measured at that length and at the base model's."""
    return chain(*(points(length) for length in LENGTHS))


def points(length: int):
    """The points of one length."""
    return prod(
        param("stages.extend.seq_len", length),
        param("stages.extend.positions.default", *thetas(length)),
        param("evals.lengths", (QUICKSTART["BASE_LENGTH"], length)),
    )


def thetas(length: int) -> list[float]:
    """Whole numbers, for the sake of the points' names."""
    theta, trained, head_dim = QUICKSTART["BASE_THETA"], QUICKSTART["BASE_LENGTH"], QUICKSTART["MODEL"]["head_dim"]
    return sorted({theta, *(float(round(x)) for x in ladder(theta, trained, length, head_dim, MULTIPLES))})
