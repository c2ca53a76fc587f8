"""Methods that keep a part of what each model adds to a base: by size, by chance, or by how much models differ there.

Delta: W_i - W_base. Where models are at odds over a sign, the larger side wins, as in TIES. Random masks depend on the seed, the
tensor's name, the model's number and the block alone, so that the same merge gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lcx.core.errors import UserError
from lcx.merging.methods.method import DENSITY, LAMBDA, WEIGHT, Merge, Method, Values, normalize
from lcx.merging.methods.span import TINY, combined, shares
from lcx.merging.parameters import Parameter
from lcx.merging.selection import Largest, largest
from lcx.merging.tensors import Block, Tensor

Sparsify = Callable[[int, np.ndarray, int], np.ndarray]
"""From a model's number, its deltas in a block (which may be overwritten), and the block's number to what is left of them."""


def add_up(tensor: Tensor, values: Values, sparsify: Sparsify, elect: bool) -> Merge:
    """W_base + lambda times the weighted sum of what `sparsify` leaves, by elected signs or as it is."""
    weights, factor = values.each("weight"), float(values["lambda"])
    if not elect:
        factors = shares(tensor.name, weights) if values["normalize"] else weights

    def merge(block: Block) -> np.ndarray:
        deltas = [sparsify(i, delta, block.index) for i, delta in enumerate(block.deltas())]
        total = elected(deltas, weights, values["normalize"]) if elect else combined(deltas, factors)
        total *= factor
        return block.changed(total)

    return merge


def elected(deltas: Sequence[np.ndarray], weights: np.ndarray, divide: bool, raw: bool = False) -> np.ndarray:
    """The sum of w_i Delta_i over entries of the elected sign; if `divide`, over the sum of the kept w_i (arXiv:2306.01708).

    The sign is that of the sum of w_i Delta_i (`raw`: of Delta_i), + where that is 0. The deltas are overwritten.
    """
    sums = sum(deltas[1:], start=deltas[0].copy()) if raw else None
    weighted = [np.multiply(delta, float(weight), out=delta) for delta, weight in zip(deltas, weights, strict=True)]
    if sums is None:
        sums = sum(weighted[1:], start=weighted[0].copy())
    positive = sums >= 0
    total, divisor = np.zeros_like(sums), np.zeros_like(sums) if divide else None
    for entry, weight in zip(weighted, weights, strict=True):
        kept = (entry > 0) == positive
        kept &= entry != 0
        entry *= kept
        total += entry
        if divisor is not None:
            divisor += np.multiply(kept, float(weight), dtype=divisor.dtype)
    if divisor is not None:
        divisor += np.abs(divisor) < TINY  # faster than an assignment to some entries
        total /= divisor
    return total


def _size(block: Block, model: int) -> np.ndarray:
    """Absolute deltas of one model."""
    delta = block.deltas()[model]
    return np.abs(delta, out=delta)


def _largest_deltas(tensor: Tensor, model: int, k: int) -> Largest:
    return largest(tensor.only(model), k, lambda block: _size(block, 0))


def ties(tensor: Tensor, values: Values) -> Merge:
    """Each delta cut to its largest entries (`density`, 1: all), then signs elected (arXiv:2306.01708)."""
    cuts = [
        _largest_deltas(tensor, i, int(share * tensor.size)) if share < 1 else None
        for i, share in enumerate(values.each("density"))
    ]

    def sparsify(model: int, delta: np.ndarray, block: int) -> np.ndarray:
        if (cut := cuts[model]) is not None:
            delta *= cut.mask(np.abs(delta), block)
        return delta

    return add_up(tensor, values, sparsify, elect=True)


def breadcrumbs(tensor: Tensor, values: Values, elect: bool) -> Merge:
    """Without the largest share `gamma` of each delta and without its smallest, so that a share `density` is left.

    arXiv:2312.06795. Where both together are more than all, fewer of the largest are dropped.
    """
    bands: list[tuple[Largest, Largest] | None] = []
    for i, (density, gamma) in enumerate(zip(values.each("density"), values.each("gamma"), strict=True)):
        kept, dropped = int(density * tensor.size), int(gamma * tensor.size)
        dropped = min(dropped, tensor.size - kept)
        whole = kept == tensor.size
        bands.append(None if whole else (_largest_deltas(tensor, i, dropped), _largest_deltas(tensor, i, dropped + kept)))

    def sparsify(model: int, delta: np.ndarray, block: int) -> np.ndarray:
        if (band := bands[model]) is not None:
            size = np.abs(delta)
            delta *= band[1].mask(size, block) & ~band[0].mask(size, block)
        return delta

    return add_up(tensor, values, sparsify, elect)


def dare(tensor: Tensor, values: Values, elect: bool) -> Merge:
    """Each delta's entries kept with probability `density`, and scaled up again (arXiv:2311.03099).

    `rescale_by` is `l1`, which keeps the sum of the absolute entries, or `density`, the paper's 1/density.
    """
    densities = values.each("density")

    def mask(model: int, delta: np.ndarray, block: int) -> np.ndarray | None:
        if densities[model] == 1:
            return None
        return tensor.random(model, block).random(delta.shape, np.float32) < densities[model]

    return add_up(tensor, values, _random(tensor, values, densities, mask), elect)


def della(tensor: Tensor, values: Values, elect: bool) -> Merge:
    """As DARE, but an entry is kept the likelier the larger it is within its row: density - epsilon .. density + epsilon
    (arXiv:2406.11617)."""
    densities, epsilons = values.each("density"), values.each("epsilon")
    for density, epsilon in zip(densities, epsilons, strict=True):
        if not 0 < density - epsilon <= density + epsilon < 1:
            raise UserError(
                f"{tensor.name}: density={density:g} and epsilon={epsilon:g}: probabilities from density - epsilon to density + "
                "epsilon must lie between 0 and 1; change one of them"
            )

    def mask(model: int, delta: np.ndarray, block: int) -> np.ndarray:
        likely = densities[model] + epsilons[model] * (2 * row_ranks(np.abs(delta)) - 1)
        return tensor.random(model, block).random(delta.shape, np.float32) < likely

    return add_up(tensor, values, _random(tensor, values, densities, mask), elect)


def row_ranks(sizes: np.ndarray) -> np.ndarray:
    """The rank of each entry within its row, from 0 for the smallest to 1 for the largest, float32; 1/2 in a row of one."""
    rows, columns = sizes.shape
    if columns == 1:
        return np.full(sizes.shape, 0.5, np.float32)
    # A size's bits, which are in the order of the sizes, before its column: sorting such numbers is ten times faster than argsort.
    keys = np.ascontiguousarray(sizes, np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(columns, dtype=np.uint64)
    keys.sort(axis=1)
    places = (keys & np.uint64(0xFFFFFFFF)).astype(np.intp) + columns * np.arange(rows)[:, None]
    ranks = np.empty(sizes.shape, np.float32)
    ranks.reshape(-1)[places] = np.arange(columns, dtype=np.float32) / (columns - 1)
    return ranks


Mask = Callable[[int, np.ndarray, int], np.ndarray | None]


def _random(tensor: Tensor, values: Values, densities: np.ndarray, mask: Mask) -> Sparsify:
    """Entries under a random mask, rescaled as `rescale` and `rescale_by` say."""
    factors = [1.0] * len(tensor.models)
    if values["rescale"] and values["rescale_by"] == "density":
        factors = [1 / density for density in densities]
    elif values["rescale"]:

        def sums(block: Block) -> np.ndarray:
            found = []
            for i, delta in enumerate(block.deltas()):
                kept = mask(i, delta, block.index)
                sizes = np.abs(delta, out=delta)
                whole = sizes.sum(dtype=np.float64)
                found.append((whole, whole if kept is None else (sizes * kept).sum(dtype=np.float64)))
            return np.array(found)

        factors = [whole / kept if kept > 0 else 1.0 for whole, kept in tensor.total(sums)]

    def sparsify(model: int, delta: np.ndarray, block: int) -> np.ndarray:
        kept = mask(model, delta, block)
        if kept is not None:
            delta *= kept
        if factors[model] != 1:
            delta *= float(factors[model])
        return delta

    return sparsify


def sce(tensor: Tensor, values: Values) -> Merge:
    """Entries where models differ most (`select_topk`), weighted by the mean square of what is left, signs elected
    (arXiv:2408.07990)."""

    def variance(block: Block) -> np.ndarray:
        return np.var(block.deltas(), axis=0, dtype=np.float32)

    chosen = None
    if values["select_topk"] < 1:
        differing = int(tensor.total(lambda block: int(np.count_nonzero(variance(block)))))
        chosen = largest(tensor, int(values["select_topk"] * differing), variance)

    def selected(block: Block) -> list[np.ndarray]:
        deltas = block.deltas()
        if chosen is not None:
            kept = chosen.mask(np.var(deltas, axis=0, dtype=np.float32), block.index)
            deltas = [np.multiply(delta, kept, out=delta) for delta in deltas]
        return deltas

    squares = tensor.total(lambda block: np.array([np.square(delta, dtype=np.float64).sum() for delta in selected(block)]))
    weights = squares / squares.sum() if squares.sum() > 0 else np.full(len(squares), 1 / len(squares))

    def merge(block: Block) -> np.ndarray:
        return block.changed(elected(selected(block), weights, divide=True, raw=True))

    return merge


RESCALE = {"rescale": Parameter(True, bool), "rescale_by": Parameter("l1", str, choices=("l1", "density"))}


def _task(default: bool, **own: Parameter) -> dict[str, Parameter]:
    return {"weight": WEIGHT, "density": DENSITY, **own, "lambda": LAMBDA, "normalize": normalize(default)}


GAMMA = Parameter(0.01, each=True, least=0.0, most=1.0)
EPSILON = Parameter(0.15, each=True, least=0.0, most=0.5)

SPARSE = {
    "ties": Method(ties, _task(True)),
    "dare_linear": Method(lambda tensor, values: dare(tensor, values, elect=False), _task(False, **RESCALE)),
    "dare_ties": Method(lambda tensor, values: dare(tensor, values, elect=True), _task(False, **RESCALE)),
    "della": Method(lambda tensor, values: della(tensor, values, elect=True), _task(True, epsilon=EPSILON, **RESCALE)),
    "della_linear": Method(lambda tensor, values: della(tensor, values, elect=False), _task(False, epsilon=EPSILON, **RESCALE)),
    "breadcrumbs": Method(lambda tensor, values: breadcrumbs(tensor, values, elect=False), _task(False, gamma=GAMMA)),
    "breadcrumbs_ties": Method(lambda tensor, values: breadcrumbs(tensor, values, elect=True), _task(False, gamma=GAMMA)),
    "sce": Method(sce, {"select_topk": Parameter(1.0, least=0.0, most=1.0, above=True)}, least=1),
}
"""Name in YAML -> method."""
