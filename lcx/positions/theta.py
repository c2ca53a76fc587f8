"""Choosing theta for a longer context: critical dimension, critical base, lower bound, ladders and staged schedules.

Lengths are tokens, wavelengths tokens per turn. Sources: critical dimension and base, arXiv 2310.05209; lower bound, arXiv
2405.14591; NTK-aware base, r/LocalLLaMA 2023.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from lcx.core.errors import UserError

LADDER = (0.25, 0.5, 1.0, 2.0)
"""Multiples of the critical base that a sweep visits; published schedules lie between 0.68 and 1.05."""

GRID_STEP = 1.01
GRID_ANCHOR = 2000.0
"""The lower bound is searched among the bases `2000 * 1.01**k`, for integers k of either sign."""

MOST_THETA, MOST_LENGTH, MOST_HEAD_DIM, MOST_STAGES = 1e30, 2**31 - 1, 4096, 64
"""Positions are int32; the other bounds keep a typo from starting an endless search."""

_BLOCK = 512


def critical_dimension(theta: float, head_dim: int, length: int) -> int:
    """Dims whose pairs complete at least a turn within `length`: `2 * ceil(d / 2 * log_theta(length / 2 pi))`, at most d."""
    _check(theta, length, head_dim)
    return min(head_dim, 2 * math.ceil(head_dim / 2 * math.log(length / (2 * math.pi), theta)))


def critical_base(theta: float, length: int, target: int) -> float:
    """The theta at which the critical dimension at `target` equals that of `theta` at `length`; `UserError` above `MOST_THETA`."""
    _check(theta, length)
    _check(theta, target, name="target length")
    power = math.log(target / (2 * math.pi)) / math.log(length / (2 * math.pi))
    if power * math.log10(theta) > math.log10(MOST_THETA):
        raise UserError(
            f"trained length={length:,} with theta={theta:g} has a critical base of 1e{power * math.log10(theta):.0f} at "
            f"{target:,} tokens, above {MOST_THETA:g}; extend a model that was trained at more tokens"
        )
    return theta**power


def ntk_base(theta: float, factor: float, head_dim: int) -> float:
    """The NTK-aware theta, `theta * factor ** (d / (d - 2))`: too low beyond a few-fold extension, hence a sweep's low control."""
    _check(theta, None, head_dim)
    if not factor >= 1:
        raise UserError(f"factor={factor!r} must be at least 1; it is target length / trained length")
    if head_dim < 4:
        raise UserError(f"head_dim={head_dim} is too small for NTK-aware scaling, which needs at least 4")
    return theta * factor ** (head_dim / (head_dim - 2))


def untrained_pairs(theta: float, head_dim: int, length: int) -> list[int]:
    """Indices of the rotary pairs whose wavelength exceeds `length`: pairs that never completed a turn in training."""
    _check(theta, length, head_dim)
    return [i for i in range(head_dim // 2) if 2 * math.pi * theta ** (2 * i / head_dim) > length]


def usable_length(theta: float, head_dim: int, limit: int) -> int:
    """Largest L <= `limit` such that `B(m) = sum_i cos(m * theta ** (-2i / d))` is >= 0 for every m <= L."""
    _check(theta, None, head_dim)
    sums = _Sums(theta, head_dim, limit)
    negative = next((m for blocks in sums.runs(sums.blocks) if (m := sums.negative(blocks)) is not None), None)
    return limit if negative is None else negative - 1


def lower_bound(length: int, head_dim: int) -> float:
    """Smallest base of the 1% grid with `B(m) >= 0` for every m <= `length` (arXiv 2405.14591).

    B is not monotonic in the base, and the bases that pass are isolated: another grid gives a value up to a third away.
    """
    return lower_bounds([length], head_dim)[0]


def lower_bounds(lengths: Sequence[int], head_dim: int) -> list[float]:
    """`lower_bound` of each of several lengths, in one upward search."""
    for length in lengths:
        _check(None, length, head_dim)
    found: dict[int, float] = {}
    # The base needs to grow about as length ** 1.6; bases below sqrt(length) fail within a few tokens.
    step = math.ceil(math.log(max(1.1, min(lengths) ** 0.5) / GRID_ANCHOR, GRID_STEP))
    for length in sorted(set(lengths)):
        while _Sums(GRID_ANCHOR * GRID_STEP**step, head_dim, length).any_negative():
            step += 1
            if GRID_ANCHOR * GRID_STEP**step > 1e30:
                raise UserError(f"no base up to 1e30 keeps B(m) >= 0 up to length {length} with head_dim={head_dim}; use more dims")
        found[length] = GRID_ANCHOR * GRID_STEP**step
    return [found[length] for length in lengths]


class _Sums:
    """B(m) of one base for every m <= length, block by block, in float64.

    cos((a + j) f) = cos(af) cos(jf) - sin(af) sin(jf) turns blocks of B into a matrix product instead of many cosines.
    """

    def __init__(self, base: float, head_dim: int, length: int) -> None:
        self.length = length
        self.blocks = np.arange(length // _BLOCK + 1)
        self.frequencies = float(base) ** (-2 * np.arange(head_dim // 2) / head_dim)
        coarse = np.exp(1j * self.frequencies[:, None, None] * np.arange(0, _BLOCK, 32)[None, :, None])
        within = (coarse * np.exp(1j * self.frequencies[:, None, None] * np.arange(32)[None, None, :])).reshape(-1, _BLOCK)
        self.inner = np.concatenate([np.real(within), -np.imag(within)])

    def negative(self, blocks: np.ndarray) -> int | None:
        """The first m of these blocks, in their order, with B(m) < 0."""
        starts = _BLOCK * blocks
        angles = starts[:, None] * self.frequencies[None, :]
        values = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) @ self.inner
        m = (starts[:, None] + np.arange(_BLOCK)[None, :])[values < 0]
        m = m[m <= self.length]
        return int(m[0]) if m.size else None

    def runs(self, blocks: np.ndarray) -> Iterator[np.ndarray]:
        """`blocks` in runs of growing size, so that an early answer is cheap."""
        start, size = 0, 2
        while start < len(blocks):
            yield blocks[start : start + size]
            start, size = start + size, min(2 * size, 256)

    def any_negative(self) -> bool:
        """True if B is negative anywhere. Blocks where the sum over the slow pairs is lowest are examined first."""
        if self.negative(self.blocks[:4]) is not None:
            return True
        slow = self.frequencies[self.frequencies * _BLOCK < math.pi]
        middles = _BLOCK * self.blocks + _BLOCK // 2
        order = np.argsort(np.cos(middles[:, None] * slow[None, :]).sum(axis=1), kind="stable")
        return any(self.negative(blocks) is not None for blocks in self.runs(self.blocks[order]))


def ladder(theta: float, length: int, target: int, head_dim: int, multiples: Sequence[float] = LADDER) -> list[float]:
    """Ascending thetas for a sweep: `multiples` of the critical base, and the NTK-aware base as the low control."""
    critical = critical_base(theta, length, target)
    return sorted({ntk_base(theta, max(1.0, target / length), head_dim), *(multiple * critical for multiple in multiples)})


def retries(theta: float, length: int, target: int) -> list[float]:
    """Thetas in the order to try them: the critical base, then its double, half and quarter."""
    critical = critical_base(theta, length, target)
    return [critical * multiple for multiple in (1.0, 2.0, 0.5, 0.25)]


def schedule(length: int, theta: float, target: int, factor: float = 4.0) -> list[tuple[int, float]]:
    """Stages `(length, theta)` from `length` (excluded) up to `target`, each `factor` times the previous one, the last exact.

    Each theta is the critical base, which is the same whether computed from the first stage or from the previous one.
    """
    _check(theta, length, name="trained length")
    _check(theta, target, name="target length")
    if target < length:
        raise UserError(f"target length {target} is below the trained length {length}; there is nothing to extend")
    if not factor > 1:
        raise UserError(f"stage factor={factor!r} must be above 1, such as 4")
    if factor**MOST_STAGES * length < target:
        least = (target / length) ** (1 / MOST_STAGES)
        raise UserError(f"stage factor={factor!r} needs more than {MOST_STAGES} stages to {target:,}; set it above {least:.3g}")
    lengths, reached = [], float(length)
    while reached * factor < target:
        reached *= factor
        lengths.append(round(reached))
    if target > length:
        lengths.append(target)
    return [(stage, critical_base(theta, length, stage)) for stage in lengths]


@dataclasses.dataclass(frozen=True)
class StageTheta:
    """The results of the formulas for one target length."""

    length: int
    factor: float
    critical_base: float
    ntk_base: float
    lower_bound: float | None


@dataclasses.dataclass(frozen=True)
class ThetaReport:
    """Everything that `lcx theta` prints; `lcx.core.configs.plain` converts it for JSON."""

    trained_length: int
    theta: float
    target_length: int
    head_dim: int
    critical_dimension: int
    untrained_pairs: tuple[int, ...]
    critical_base: float
    ntk_base: float
    lower_bound: float | None
    ladder: tuple[float, ...]
    stages: tuple[StageTheta, ...]

    HEADER = ("length", "factor", "critical base", "NTK-aware", "lower bound")

    def rows(self) -> list[tuple[str, ...]]:
        """The stages as rows of text for a table with the columns of `HEADER`."""
        return [
            (
                f"{stage.length:,}",
                f"{stage.factor:g}",
                f"{stage.critical_base:.4g}",
                f"{stage.ntk_base:.4g}",
                "" if stage.lower_bound is None else f"{stage.lower_bound:.2g}",
            )
            for stage in self.stages
        ]


def report(
    length: int, theta: float, target: int, head_dim: int, factor: float = 4.0, with_lower_bound: bool = True
) -> ThetaReport:
    """The report on extending a model trained at `length` with `theta` to `target`; takes seconds for a million tokens.

    Raises `UserError` for impossible values.
    """
    stages = schedule(length, theta, target, factor)
    lengths = [stage for stage, _ in stages] or [target]
    bounds = lower_bounds(lengths, head_dim) if with_lower_bound else [None] * len(lengths)
    return ThetaReport(
        trained_length=length,
        theta=theta,
        target_length=target,
        head_dim=head_dim,
        critical_dimension=critical_dimension(theta, head_dim, length),
        untrained_pairs=tuple(untrained_pairs(theta, head_dim, length)),
        critical_base=critical_base(theta, length, target),
        ntk_base=ntk_base(theta, target / length, head_dim),
        lower_bound=bounds[-1],
        ladder=tuple(ladder(theta, length, target, head_dim)),
        stages=tuple(
            StageTheta(stage, stage / length, base, ntk_base(theta, stage / length, head_dim), bound)
            for (stage, base), bound in zip(stages, bounds, strict=bool(stages))
        ),
    )


def _check(theta: float | None, length: int | None, head_dim: int | None = None, name: str = "length") -> None:
    if theta is not None and not 1 < theta <= MOST_THETA:
        raise UserError(f"theta={theta!r} must be a number above 1, such as 10000, and at most {MOST_THETA:g}")
    if length is not None and not 7 <= length <= MOST_LENGTH:
        raise UserError(f"{name}={length!r} must be at least 7 tokens, a turn of the fastest pair, and at most {MOST_LENGTH:,}")
    if head_dim is not None and (not 2 <= head_dim <= MOST_HEAD_DIM or head_dim % 2):
        near = min(MOST_HEAD_DIM, max(2, head_dim + head_dim % 2))
        raise UserError(f"head_dim={head_dim!r} must be even, at least 2 and at most {MOST_HEAD_DIM:,}, such as {near}")
