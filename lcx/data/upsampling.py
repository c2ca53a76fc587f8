"""Length upsampling: long documents get a larger share because short ones are thinned (Fu et al., arXiv:2402.10171).

`per_source` thins within each part, whose weight fixes its share of the rows: the mix stays what it was, and within a part long
documents take the place of short ones. `global` thins all text as one pool of documents, so a part of long documents keeps more of
its tokens than one of short ones, and the mix shifts towards it. `none` takes documents as they are.

Legend: D documents, P parts.
"""

from __future__ import annotations

import numpy as np

from lcx.core.errors import UserError
from lcx.data.config import Upsampling
from lcx.data.sources.sources import Subset


def thin(source: Subset, short_tokens: int, short_keep: float, rng: np.random.Generator) -> Subset:
    """All documents of at least `short_tokens` tokens, and shorter ones with probability `short_keep`.

    Raises `UserError` if none is left.
    """
    keep = (source.lengths >= short_tokens) | (rng.random(len(source.lengths)) < short_keep)
    if not keep.any():
        raise UserError(f"short_keep={short_keep} keeps none of {len(keep)} documents; raise it or lower short_tokens")
    return Subset(source.source, source.ids[keep])


def weigh(weights: np.ndarray, kept: np.ndarray, how: Upsampling) -> np.ndarray:
    """The weights with which parts are mixed, float64 `[..., P]` like `weights`.

    `kept` `[P]` is the fraction of a part's tokens that thinning leaves, NaN for parts that are not text, whose weights stay. Under
    `global` text keeps the sum of its weights, and a part's share of it is proportional to weight times `kept`.
    """
    text = ~np.isnan(kept)
    if how != "global" or not text.any():
        return weights
    left = np.where(text, weights * np.where(text, kept, 0.0), 0.0)
    before, after = (x.sum(axis=-1, keepdims=True) for x in (np.where(text, weights, 0.0), left))
    return np.where(text, left * (before / np.where(after > 0, after, 1.0)), weights)
