"""Logistic regression on vectors, and how good its probabilities are on examples that it has not seen.

Legend: N examples, F features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lcx.core.extras import library

BINS = 10
"""Bins of probability in which predictions are compared with what was found."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """P(good) = σ(x · weights + bias); weights float64 `[F]`."""

    weights_F: np.ndarray
    bias: float

    def __call__(self, x_NF: np.ndarray) -> np.ndarray:
        """Probabilities float32 `[N]`; NaN where a feature is."""
        return (0.5 * (1 + np.tanh(0.5 * (x_NF @ self.weights_F + self.bias)))).astype(np.float32)


def fit(x_NF: np.ndarray, good_N: np.ndarray, penalty: float) -> Classifier:
    """The maximum of Σ ln P − penalty · |weights|² / 2.

    Features are meant to be vectors of length 1. `good_N` is bool, and both kinds occur. Raises `UserError` without scikit-learn.
    """
    linear = library("sklearn.linear_model", "a quality classifier", "data")
    model = linear.LogisticRegression(C=1 / penalty, max_iter=1000)
    model.fit(np.asarray(x_NF, np.float64), good_N)
    return Classifier(model.coef_[0], float(model.intercept_[0]))


def auc(p_N: np.ndarray, good_N: np.ndarray) -> float:
    """The probability that a good example has a higher value than another one, where equal values count half."""
    _, ranks = np.unique(p_N, return_inverse=True)
    below = np.cumsum(np.bincount(ranks[~good_N], minlength=ranks.max() + 1))
    equal = np.bincount(ranks[~good_N], minlength=ranks.max() + 1)
    wins = (below[ranks[good_N]] - equal[ranks[good_N]] / 2).sum()
    return float(wins / (good_N.sum() * (~good_N).sum()))


def held_out_figures(p_N: np.ndarray, good_N: np.ndarray) -> dict[str, Any]:
    """AUC, precision and recall where P ≥ 0.5 counts as good, and by bin of P how many examples, their mean P and share of good."""
    chosen = p_N >= 0.5
    hits = int((chosen & good_N).sum())
    place = np.minimum((p_N * BINS).astype(np.int64), BINS - 1)
    calibration = []
    for i in range(BINS):
        inside = place == i
        row: dict[str, Any] = {"from": i / BINS, "to": (i + 1) / BINS, "documents": int(inside.sum())}
        if inside.any():
            row |= {"predicted": _round(p_N[inside].mean(dtype=np.float64)), "good": _round(good_N[inside].mean())}
        calibration.append(row)
    return {
        "auc": _round(auc(p_N, good_N)),
        "precision": _round(hits / chosen.sum()) if chosen.any() else None,
        "recall": _round(hits / good_N.sum()),
        "calibration": calibration,
    }


def _round(value: float) -> float:
    return round(float(value), 6)
