"""Methods of one model and a base, entry by entry, and the method that merges nothing."""

from __future__ import annotations

import numpy as np

from lcx.merging.methods.method import Merge, Method, Values
from lcx.merging.parameters import Parameter
from lcx.merging.tensors import Block, Tensor

SAMPLE = 1_000_000
"""Importances of which quartiles are taken; of a larger tensor every n-th."""


def nearswap(tensor: Tensor, values: Values) -> Merge:
    """The base, moved towards the model by at most `t` in every entry: weight t/|a - b|, at most 1."""
    t = float(values["t"])

    def merge(block: Block) -> np.ndarray:
        (delta,) = block.deltas()
        return block.changed(np.clip(delta, -t, t, out=delta))

    return merge


def importance(base: np.ndarray, model: np.ndarray) -> np.ndarray:
    """|Delta| times KL(softmax of the model's row || softmax of the base's), float32 `[R, C]`.

    In float64: a fine-tune's rows are so close to the base's that their divergence is what float32 rounds away.
    """
    ours, theirs = _log_softmax(model), _log_softmax(base)
    divergence = (np.exp(ours) * (ours - theirs)).sum(axis=1, keepdims=True)
    return (np.abs(model - base) * divergence).astype(np.float32)


def outstanding(samples: np.ndarray) -> float:
    """The median plus 1.5 times the way from the lower quartile to the upper, each of two neighbours the lower."""
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75), method="lower").astype(np.float64)
    return float(middle + 1.5 * (high - low))


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.max(axis=1, keepdims=True).astype(np.float64)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def arcee_fusion(tensor: Tensor, values: Values) -> Merge:
    """The model's entries of outstanding importance, at least the median plus 1.5 interquartile ranges, and the base's others."""
    every = -(-tensor.size // SAMPLE)

    def sample(block: Block) -> np.ndarray:
        start = block.start * tensor.columns
        return importance(*block.inputs()).reshape(-1)[-start % every :: every]

    threshold = np.float32(outstanding(np.concatenate(list(tensor.over(sample)))))

    def merge(block: Block) -> np.ndarray:
        base, model = block.inputs()
        return np.where(importance(base, model) >= threshold, model, base)

    return merge


def passthrough(tensor: Tensor, values: Values) -> Merge:
    """One model's tensor as it is, or times `scale`."""
    (scale,) = values.each("scale").tolist()

    def merge(block: Block) -> np.ndarray:
        (model,) = block.models
        return model if scale == 1 else np.multiply(model, scale, out=model)

    return merge


PAIRS = {
    "nearswap": Method(nearswap, {"t": Parameter(None, least=0.0)}, most=1),
    "arcee_fusion": Method(arcee_fusion, {}, most=1),
    "passthrough": Method(passthrough, {"scale": Parameter(1.0, each=True)}, base="none", most=1),
}
"""Name in YAML -> method."""
