"""Which documents stay by their scores, and what a report shows of a score. Legend: D documents."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lcx.core.configs import choice, nearest
from lcx.core.errors import UserError
from lcx.data.curation.scores import Column, ScoreConfig, number

DECILE_SAMPLES = 3
"""Documents of each decile that a report shows."""

HISTOGRAM_BINS = 24
"""Bins of a score's values in a report."""


@dataclasses.dataclass(frozen=True)
class KeepRule:
    """Which documents of a source stay by one score: those of at least `minimum`, or those at the top.

    `top_share` of the documents that have the score, or `by` bytes of their text: the best, as few as reach that share; of equal
    scores the document read first. A document without the score is dropped.
    """

    minimum: float | None = None
    top_share: float | None = None
    by: Literal["documents", "bytes"] = "documents"

    def __post_init__(self) -> None:
        choice("keep.by", self.by, ("documents", "bytes"))
        if (self.minimum is None) == (self.top_share is None):
            raise UserError("a keep rule has either minimum or top_share; set one of them")
        if self.top_share is None and self.by != "documents":
            raise UserError(f"keep.by={self.by!r} is about top_share, which is not set; leave it out with minimum")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise UserError(f"keep.top_share={self.top_share!r} must be above 0 and at most 1")


def check_keep(keep: Mapping[str, KeepRule], source: str, scores: Mapping[str, ScoreConfig]) -> None:
    """Raises `UserError` for a rule about a score that the source does not have."""
    for name in keep:
        if name not in scores:
            raise UserError(f"config.sources.{source}.keep.{name} is about no score of config.scores{nearest(name, scores)}")
        if scores[name].sources and source not in scores[name].sources:
            raise UserError(f"config.sources.{source}.keep.{name} needs {source!r} in config.scores.{name}.sources; add it there")


def at_top(values: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """The places of the highest values, bool `[D]`: as few as have at least a share of the sum of weights; ties by place.

    `values` float `[D]` without NaN, `weights` int `[D]`.
    """
    order = np.argsort(-values.astype(np.float64), kind="stable")
    total = weights[order].cumsum(dtype=np.int64)
    before = total - weights[order]
    # 0.07 · 100 is 7.000000000000001, which must not take an eighth document.
    needed = share * (int(total[-1]) if len(total) else 0) * (1 - 1e-12)
    found = np.zeros(len(values), bool)
    found[order[before < needed]] = True
    return found


def drops(keep: Mapping[str, KeepRule], scores: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[int, str]:
    """Place of a document that does not stay -> the reason: the first rule, by name of the score, that it breaks.

    Every rule is about all documents of the source, whatever the others drop. `scores`: float32 `[D]` each, NaN where there is
    none; `sizes` int64 `[D]` in bytes.
    """
    dropped: dict[int, str] = {}
    for name, rule in sorted(keep.items()):
        known = ~np.isnan(scores[name])
        values, good = scores[name][known], known.copy()
        if rule.minimum is not None:
            good[known], reason = values >= np.float32(rule.minimum), f"{name}_below_minimum"
        else:
            weights = sizes if rule.by == "bytes" else np.ones_like(sizes)
            good[known], reason = at_top(values, weights[known], rule.top_share or 0), f"{name}_not_at_top"
        for place in np.flatnonzero(~good).tolist():
            dropped.setdefault(place, reason if known[place] else f"{name}_missing")
    return dropped


def summary(config: ScoreConfig, column: Column, names: Sequence[str], samples: int) -> tuple[dict[str, Any], dict[int, int]]:
    """What a report says of a score in a source, and the documents to show: place -> decile, from 0 for the lowest tenth.

    `deciles` are the eleven quantiles from the minimum to the maximum, each a value that occurs; `histogram` counts documents in
    bins of equal width between these two. Shown are those whose names have the smallest hashes.
    """
    known = np.flatnonzero(~np.isnan(column.values))
    order = known[np.argsort(column.values[known], kind="stable")]
    ends = [column.values[order[round(i * (len(order) - 1) / 10)]] for i in range(11)] if len(order) else []
    content = {
        "kind": config.kind,
        "documents": len(column.values),
        "missing": len(column.values) - len(known) - len(column.errors),
        "failed": len(column.errors),
        "mean": number(np.float32(column.values[known].mean(dtype=np.float64))) if len(known) else None,
        "deciles": [number(value) for value in ends],
        "histogram": np.histogram(column.values[known].astype(np.float64), HISTOGRAM_BINS)[0].tolist() if len(known) else [],
    }
    shown: dict[int, int] = {}
    for decile, places in enumerate(np.array_split(order, 10)):
        by_hash = sorted(places.tolist(), key=lambda place: (_hash(names[place]), place))
        shown |= dict.fromkeys(by_hash[: min(samples, DECILE_SAMPLES)], decile)
    return content, shown


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
