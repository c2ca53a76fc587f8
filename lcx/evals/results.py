"""What an evaluation found, as plain records that go to JSON and back.

A `EvalResult` is one checkpoint: needle grids and perplexity curves, each under one positional scheme.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.core.files import write_atomically


def wilson(correct: int, items: int, z: float = 1.959963985) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), 95% by default; (0, 1) when there are no items."""
    if items <= 0:
        return 0.0, 1.0
    share, square = correct / items, z * z
    centre = (share + square / (2 * items)) / (1 + square / items)
    half = z * math.sqrt(share * (1 - share) / items + square / (4 * items * items)) / (1 + square / items)
    # At 0 and at all the formula gives the bound exactly, up to rounding.
    return (0.0 if correct <= 0 else max(0.0, centre - half)), (1.0 if correct >= items else min(1.0, centre + half))


@dataclasses.dataclass(frozen=True)
class NeedleGrid:
    """Needles found over depth x length: `correct[depth][length]` of `items` in each cell.

    `lengths` in tokens, answer included; `depths` from 0 (start of the context) to 1 (just before the question). `method` is
    "teacher_forced" (every answer token equals the argmax) or "generation" (greedy). `scheme` says how positions were encoded.
    `trained` is the longest length that the checkpoint has seen.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    correct: tuple[tuple[int, ...], ...]
    items: int
    method: str = "teacher_forced"
    scheme: str = "none"
    trained: int | None = None

    def accuracy(self) -> list[list[float]]:
        """Share found, `[depth][length]`."""
        return [[count / self.items for count in row] for row in self.correct]

    def by_length(self) -> dict[int, float]:
        """Mean over depths for each length."""
        total = self.items * len(self.depths)
        return {length: sum(row[i] for row in self.correct) / total for i, length in enumerate(self.lengths)}

    def mean(self, above: int = 0) -> float:
        """Mean over all cells whose length is above `above`; NaN when there are none."""
        shares = [share for length, share in self.by_length().items() if length > above]
        return sum(shares) / len(shares) if shares else math.nan

    def worst(self, above: int = 0) -> float:
        """The worst cell whose length is above `above`; NaN when there are none."""
        cells = [row[i] for row in self.correct for i, length in enumerate(self.lengths) if length > above]
        return min(cells) / self.items if cells else math.nan

    def interval(self, depth: int | None = None, length: int | None = None, above: int = 0) -> tuple[float, float]:
        """95% Wilson interval of one cell, row or column (by index), or of all cells whose length is above `above`."""
        rows = self.correct if depth is None else (self.correct[depth],)
        counts = [count for row in rows for i, count in enumerate(row) if self.lengths[i] > above and length in (None, i)]
        return wilson(sum(counts), self.items * len(counts))

    def effective_length(self, threshold: float = 0.856) -> int:
        """Longest length such that it and every shorter one average above `threshold` (RULER's 85.6%); 0 when none does."""
        reached = 0
        for length, share in sorted(self.by_length().items()):
            if not share > threshold:
                break
            reached = length
        return reached


@dataclasses.dataclass(frozen=True)
class PerplexityPoint:
    """Held-out loss at one length, in nats per token.

    `nll` is the mean over `tokens` tokens in windows of `length` that move on by `stride`; every token counts once, with the
    longest context that some window gives it. `final_nll` is the mean over the last `final_tokens / spans` tokens of each span,
    seen with `length` tokens before the span's end: the same tokens at every length, so it falls if and only if more context
    helps.
    """

    length: int
    stride: int
    tokens: int
    nll: float
    final_tokens: int
    final_nll: float

    @property
    def perplexity(self) -> float:
        """exp of the token-weighted mean loss; infinite past what a float holds."""
        return _exp(self.nll)

    @property
    def final_perplexity(self) -> float:
        """exp of the mean loss over the spans' last tokens."""
        return _exp(self.final_nll)


@dataclasses.dataclass(frozen=True)
class PositionLoss:
    """Mean loss (nats per token) of the tokens at positions `edges[i] <= p < edges[i + 1]` of windows of `length`."""

    length: int
    edges: tuple[int, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PerplexityCurve:
    """Perplexity against length under one scheme; `bytes_per_token` turns nats per token into bits per byte."""

    points: tuple[PerplexityPoint, ...]
    positions: PositionLoss
    bytes_per_token: float = 1.0
    scheme: str = "none"
    trained: int | None = None
    joined: bool = False

    def at(self, length: int) -> PerplexityPoint:
        """The point at `length`; raises `UserError` when it was not measured."""
        for point in self.points:
            if point.length == length:
                return point
        raise UserError(
            f"perplexity at length={length} was not measured; measured: {', '.join(str(p.length) for p in self.points)}"
        )

    def bits_per_byte(self, length: int) -> float:
        """Loss at `length` in bits per byte of text."""
        return self.at(length).nll / math.log(2) / self.bytes_per_token


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """All that was measured on one checkpoint: `label` names it, `trained` is its length, `step` where it stands in the run.

    Grids and curves carry the scheme under which they were made; "none" is the checkpoint as it was trained.
    """

    label: str
    trained: int
    step: int | None = None
    needles: tuple[NeedleGrid, ...] = ()
    perplexity: tuple[PerplexityCurve, ...] = ()
    seconds: float = 0.0
    settings: dict[str, object] = dataclasses.field(default_factory=dict)

    def grid(self, scheme: str = "none", method: str | None = None) -> NeedleGrid | None:
        """The first needle grid under `scheme` (and by `method`), if one was made."""
        return next((g for g in self.needles if g.scheme == scheme and method in (None, g.method)), None)

    def curve(self, scheme: str = "none") -> PerplexityCurve | None:
        """The perplexity curve under `scheme`, if one was made."""
        return next((c for c in self.perplexity if c.scheme == scheme), None)


def write(result: EvalResult, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write the result as JSON; the file appears whole or not at all."""
    return write_atomically(path, json.dumps(configs.plain(result), indent=1) + "\n")


def read(path: str | os.PathLike[str]) -> EvalResult:
    """A result written by `write`; raises `UserError` when the file is missing or holds something else."""
    return from_mapping(_load(path), str(path))


def from_mapping(values: Mapping[str, object], where: str = "result") -> EvalResult:
    """A result from the plain values of its JSON."""
    return configs.build(EvalResult, values, where)


def _load(path: str | os.PathLike[str]) -> Mapping[str, object]:
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `lcx eval` writes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and evaluate again") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not hold an evaluation; delete it and evaluate again")
    return values


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
