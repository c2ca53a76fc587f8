"""Methods whose result is a combination of whole tensors: what they know of a tensor are the inner products of its inputs.

Inner products are summed in float64 over the blocks; coefficients follow from them, and a block is combined in its own type.
M: models. `gram_MM`: inner products of the flattened vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lcx.core.errors import UserError
from lcx.merging.methods.method import LAMBDA, WEIGHT, Merge, Method, Values, normalize
from lcx.merging.parameters import Parameter
from lcx.merging.tensors import Block, Tensor

PARALLEL = 0.9995
"""Cosine beyond which two tensors are interpolated in a straight line (Shoemake's slerp as it is used for weights)."""

TINY = 1e-8
"""Norms, sines and sums of weights below this count as zero."""

WIDE = 0.5
"""Model stock's 1 + (N - 1) cos below which fine-tunes point so far apart that nothing of their mean is kept."""

Vectors = Callable[[Block], Sequence[np.ndarray]]


def gram(tensor: Tensor, vectors: Vectors) -> np.ndarray:
    """Inner products `[M, M]` of what `vectors` makes of the blocks, in float64."""

    def products(block: Block) -> np.ndarray:
        stacked = np.stack([vector.reshape(-1) for vector in vectors(block)], dtype=np.float64)
        return stacked @ stacked.T

    return tensor.total(products)


def combined(arrays: Sequence[np.ndarray], factors: Sequence[float] | np.ndarray) -> np.ndarray:
    """The sum of arrays times factors; the arrays are overwritten."""
    arrays = [np.multiply(array, float(factor), out=array) for array, factor in zip(arrays, factors, strict=True)]
    for array in arrays[1:]:
        arrays[0] += array
    return arrays[0]


def _inputs(block: Block) -> list[np.ndarray]:
    return block.inputs()


def _deltas(block: Block) -> list[np.ndarray]:
    return block.deltas()


def _with_deltas(factors: Sequence[float] | np.ndarray) -> Merge:
    """The base with deltas times factors."""

    def merge(block: Block) -> np.ndarray:
        return block.changed(combined(block.deltas(), factors))

    return merge


def shares(name: str, weights: np.ndarray) -> np.ndarray:
    """Weights divided by their sum; raises `UserError` where that is zero."""
    if abs(weights.sum()) < TINY:
        raise UserError(
            f"{name}: the weights {weights.tolist()} sum to 0; change one of them, or set parameters.normalize to false"
        )
    return weights / weights.sum()


def linear(tensor: Tensor, values: Values) -> Merge:
    """Sum of w_i W_i, over the sum of w_i if `normalize` ("Model soups", arXiv:2203.05482)."""
    weights = values.each("weight")
    factors = shares(tensor.name, weights) if values["normalize"] else weights
    return lambda block: combined(block.models, factors)


def task_arithmetic(tensor: Tensor, values: Values) -> Merge:
    """W_base + lambda times the sum of w_i (W_i - W_base) (arXiv:2212.04089)."""
    weights = values.each("weight")
    factors = shares(tensor.name, weights) if values["normalize"] else weights
    return _with_deltas(values["lambda"] * factors)


def slerp_factors(t: float, cosine: float, parallel: float = PARALLEL) -> tuple[float, float]:
    """Factors of two vectors of this cosine, on the way `t` from the first to the second; beyond `parallel` in a straight line."""
    if abs(cosine) > parallel:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(tensor: Tensor, values: Values) -> Merge:
    """Base and model on the great circle through their directions, at `t`; their lengths stay in (Shoemake 1985)."""
    cosine = float(_cosines(gram(tensor, _inputs))[0, 1])
    factors = slerp_factors(values["t"], cosine)
    return lambda block: combined(block.inputs(), factors)


def nuslerp(tensor: Tensor, values: Values) -> Merge:
    """Two models, or what they add to a base, on their great circle at w_2/(w_1 + w_2).

    As a whole, or, unless `nuslerp_flatten`, along the last axis; with `nuslerp_row_wise`, as mergekit calls it, along the first.
    """
    one, two = values.each("weight")
    t = two / (one + two) if abs(one + two) >= TINY else 0.5
    vectors: Vectors = _inputs if tensor.base is None else _deltas

    def merge(block: Block, factors: Sequence[np.ndarray] | None = None) -> np.ndarray:
        a, b = vectors(block)
        if factors is None:
            factors = _slerp_lines(t, _line_products(a, b, axis=1))
        a *= factors[0]
        b *= factors[1]
        a += b
        return a if block.base is None else block.changed(a)

    if values["nuslerp_flatten"] or len(tensor.shape) < 2:
        products = gram(tensor, vectors)
        whole = _slerp_lines(t, np.array([products[0, 0], products[0, 1], products[1, 1]]).reshape(3, 1, 1))
        return lambda block: merge(block, whole)
    if not values["nuslerp_row_wise"]:
        return merge
    by_column = _slerp_lines(t, tensor.total(lambda block: _line_products(*vectors(block), axis=0)))
    return lambda block: merge(block, by_column)


def _line_products(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """|a|^2, a b and |b|^2 of each row (axis 1) or column (axis 0), float64 `[3, ...]`."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.stack([(one * two).sum(axis, keepdims=True) for one, two in ((a, a), (a, b), (b, b))])


def _slerp_lines(t: float, products: np.ndarray) -> list[np.ndarray]:
    """Factors of both sides for all lines, float32; where the sine is next to nothing, in a straight line."""
    lengths = np.sqrt(products[0] * products[2])
    cosine = np.clip(np.divide(products[1], lengths, out=np.zeros_like(lengths), where=lengths > TINY**2), -1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    flat = np.abs(sine) < TINY
    sine[flat] = 1
    factors = [np.where(flat, share, np.sin(share * angle) / sine) for share in (1 - t, t)]
    return [factor.astype(np.float32) for factor in factors]


def _cosines(gram_MM: np.ndarray) -> np.ndarray:
    """Cosines of all pairs; those of a vector of no length are 0."""
    lengths = np.sqrt(np.diag(gram_MM))
    products = np.outer(lengths, lengths)
    return np.clip(np.divide(gram_MM, products, out=np.zeros_like(gram_MM), where=products > TINY**2), -1, 1)


def _on_sphere(tensor: Tensor, vectors: Vectors, place: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Merge:
    """A combination of directions that `place` chooses from their cosines and lengths; its factors are of unit vectors."""
    products = gram(tensor, vectors)
    lengths = np.sqrt(np.diag(products))
    of_units = place(_cosines(products), lengths)
    factors = np.divide(of_units, lengths, out=np.zeros_like(of_units), where=lengths > TINY)
    if tensor.base is None:
        return lambda block: combined(block.models, factors)
    return _with_deltas(factors)


def multislerp(tensor: Tensor, values: Values) -> Merge:
    """Directions of several models (or deltas): their weighted mean, moved along its tangents' weighted sum on the sphere."""
    weights = values.each("weight")
    if values["normalize_weights"]:
        weights = shares(tensor.name, weights)

    def place(cosines_MM: np.ndarray, lengths_M: np.ndarray) -> np.ndarray:
        length = math.sqrt(max(0.0, weights @ cosines_MM @ weights))
        if length < values["eps"]:  # they cancel out: no direction is between them
            return weights * lengths_M
        mean = weights / length
        tangent = _tangent(weights, cosines_MM, mean, curved=False)
        return float(weights @ lengths_M) * _along(mean, tangent, cosines_MM, values["eps"])

    return _on_sphere(tensor, _inputs if tensor.base is None else _deltas, place)


def karcher(tensor: Tensor, values: Values) -> Merge:
    """The mean of directions on the sphere (Karcher 1977), found step by step, times the mean length."""

    def place(cosines_MM: np.ndarray, lengths_M: np.ndarray) -> np.ndarray:
        known = lengths_M > TINY
        if not known.any():
            return np.zeros_like(lengths_M)
        weights = known / known.sum()
        length = math.sqrt(max(0.0, weights @ cosines_MM @ weights))
        mean = weights / length if length > TINY else np.eye(len(weights))[int(np.argmax(known))]
        for _ in range(int(values["max_iter"])):
            tangent = _tangent(weights, cosines_MM, mean, curved=True)
            if math.sqrt(max(0.0, tangent @ cosines_MM @ tangent)) < values["tol"]:
                break
            mean = _along(mean, tangent, cosines_MM, 0.0)
        return float(weights @ lengths_M) * mean

    return _on_sphere(tensor, _inputs, place)


def _tangent(weights: np.ndarray, cosines_MM: np.ndarray, mean: np.ndarray, curved: bool) -> np.ndarray:
    """The weighted sum of what leads from `mean` to each direction along its tangent plane, in factors of unit vectors.

    `curved`: each is as long as its way on the sphere, and not as its projection.
    """
    cosine = np.clip(cosines_MM @ mean, -1, 1)
    angle = np.arccos(cosine)
    stretch = weights.copy()
    if curved:
        sine = np.sin(angle)
        stretch *= np.divide(angle, sine, out=np.ones_like(angle), where=sine > TINY)
    return stretch - float(stretch @ cosine) * mean


def _along(mean: np.ndarray, tangent: np.ndarray, cosines_MM: np.ndarray, eps: float) -> np.ndarray:
    """From `mean` along `tangent` on the sphere, in factors of unit vectors."""
    way = math.sqrt(max(0.0, tangent @ cosines_MM @ tangent))
    return mean if way <= eps else math.cos(way) * mean + math.sin(way) / way * tangent


def model_stock(tensor: Tensor, values: Values) -> Merge:
    """Between the base and the mean of fine-tunes, by the angle between them (arXiv:2403.19522, equations 2 to 4).

    t = N cos / (1 + (N - 1) cos), of the whole tensor or of each row (`filter_wise`). Where the fine-tunes point so far apart that
    1 + (N - 1) cos is below 1/2, the base is kept.
    """
    N = len(tensor.models)
    if not values["filter_wise"]:
        share = _stock_share(_cosines(gram(tensor, _deltas))[np.triu_indices(N, 1)].mean(), N)
        return _with_deltas(np.full(N, float(share) / N))

    def merge(block: Block) -> np.ndarray:
        deltas = block.deltas()
        pairs = [(i, j) for i in range(N) for j in range(i)]
        cosine = np.mean([_row_cosines(deltas[i], deltas[j]) for i, j in pairs], axis=0)
        mean = combined(deltas, np.full(N, 1 / N))
        mean *= _stock_share(cosine, N).astype(mean.dtype)
        return block.changed(mean)

    return merge


def _stock_share(cosine: np.ndarray | float, N: int) -> np.ndarray:
    divisor = 1 + (N - 1) * np.asarray(cosine, np.float64)
    return np.divide(N * np.asarray(cosine), divisor, out=np.zeros_like(divisor), where=divisor >= WIDE)


def _row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = _line_products(a, b, axis=1)
    lengths = np.sqrt(products[0] * products[2])
    return np.divide(products[1], lengths, out=np.zeros_like(lengths), where=lengths > TINY**2)


SPAN = {
    "linear": Method(linear, {"weight": WEIGHT, "normalize": normalize(True)}, base="none"),
    "slerp": Method(slerp, {"t": Parameter(None, least=0.0, most=1.0)}, most=1),
    "nuslerp": Method(
        nuslerp,
        {"weight": WEIGHT, "nuslerp_flatten": Parameter(True, bool), "nuslerp_row_wise": Parameter(False, bool)},
        base="optional", least=2, most=2,
    ),
    "multislerp": Method(
        multislerp,
        {"weight": WEIGHT, "normalize_weights": Parameter(True, bool), "eps": Parameter(1e-8, least=0.0)},
        base="optional", least=2,
    ),
    "karcher": Method(
        karcher, {"max_iter": Parameter(10, int, least=0), "tol": Parameter(1e-5, least=0.0)}, base="none", least=2
    ),
    "task_arithmetic": Method(task_arithmetic, {"weight": WEIGHT, "lambda": LAMBDA, "normalize": normalize(False)}),
    "model_stock": Method(model_stock, {"filter_wise": Parameter(False, bool)}, least=2),
}  # fmt: skip
"""Name in YAML -> method."""
