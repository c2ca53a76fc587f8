"""Two evaluations on the same items, paired: what a checkpoint has gained or lost against another."""

from __future__ import annotations

import math
from typing import NamedTuple

from lcx.evals.results import EvalResult, Measurement
from lcx.evals.statistics import Difference, paired


class Comparison(NamedTuple):
    """A task's metric at a length: the two means, and the paired difference of its `n` items, all depths together."""

    task: str
    metric: str
    length: int
    before: float
    after: float
    n: int
    difference: Difference

    @property
    def is_loss(self) -> bool:
        """Whether less is better: nats, or bits."""
        return is_loss(self.metric)

    @property
    def has_interval(self) -> bool:
        """Whether there are items enough for an interval."""
        return math.isfinite(self.difference.high)

    @property
    def verdict(self) -> str:
        """ "better", "worse", "equal" where the interval holds 0, or "unknown" without an interval."""
        if not self.has_interval:
            return "unknown"
        low, high = (-self.difference.high, -self.difference.low) if self.is_loss else self.difference[1:3]
        return "better" if low > 0 else "worse" if high < 0 else "equal"

    @property
    def gap(self) -> str:
        """The difference as text, with its interval if there is one."""
        mean, low, high, *_ = self.difference
        return self.shown(mean, "+") + (f" [{self.shown(low, '+')}, {self.shown(high, '+')}]" if self.has_interval else "")

    def shown(self, value: float, sign: str = "") -> str:
        """A mean or a difference (`sign` "+") as text: losses in nats, scores in percent."""
        return f"{value:{sign}.4f}" if self.is_loss else f"{100 * value:{sign}.1f}%"


def is_loss(metric: str) -> bool:
    """Whether a metric is one of loss, of which less is better."""
    return "nll" in metric or metric == "bits_per_byte"


def compare(before: EvalResult, after: EvalResult, scheme: str = "none", longest: int | None = None) -> list[Comparison]:
    """Everything that both measured on the same items under a scheme, at lengths of up to `longest` tokens (None: all).

    Of the last tokens of a text as many must have been counted.
    """

    def cells(result: EvalResult) -> dict[tuple[str, str, int], list[Measurement]]:
        found: dict[tuple[str, str, int], list[Measurement]] = {}
        for row in result.rows:
            if row.scheme == scheme and row.scores and row.digest and (longest is None or row.length <= longest):
                found.setdefault((row.task, row.metric, row.length), []).append(row)
        return found

    ones, others, made = cells(before), cells(after), []
    for key in ones.keys() & others.keys():
        pairs = {row.digest: row for row in ones[key]}
        both = [(pairs[row.digest], row) for row in others[key] if row.digest in pairs]
        both = [(one, other) for one, other in both if one.n == other.n and len(one.scores or ()) == len(other.scores or ())]
        if both:
            old, new = ([score for pair in both for score in pair[side].scores or ()] for side in (0, 1))
            made.append(Comparison(*key, sum(old) / len(old), sum(new) / len(new), len(old), paired(old, new)))
    order = list(ones)
    return sorted(made, key=lambda found: order.index((found.task, found.metric, found.length)))
