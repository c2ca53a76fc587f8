"""A method on arrays that are given, and its formula's ingredients in float64."""

import numpy as np

from lcx.merging.methods.method import Values
from lcx.merging.methods.table import METHODS
from lcx.merging.tensors import Tensor


def values(name, each, **own):
    """The parameters of a method: `each` those of its models, `own` the others, defaults for the rest."""
    method = METHODS[name]
    assert all(key in method.parameters for key in [*own, *(key for one in each for key in one)])
    defaults = {key: parameter.default for key, parameter in method.parameters.items()}
    of_models = [{key: {**defaults, **one}[key] for key in method.of_models} for one in each]
    return Values({key: {**defaults, **own}[key] for key in defaults if key not in method.of_models}, tuple(of_models))


def rows_of(array):
    """Reads an array's rows as a folder's are read."""
    flat = array.reshape(-1, array.shape[-1])
    return lambda start, stop: flat[start:stop].copy()


def merged(name, models, base=None, each=None, seed=0, tensor="layers.0.weight", executor=None, **own):
    """What a method makes of arrays of one shape; `each` (None: nothing) holds the parameters of each model."""
    given = values(name, each or [{}] * len(models), **own)
    rows = None if base is None else rows_of(base)
    one = Tensor(tensor, models[0].shape, [rows_of(model) for model in models], rows, executor, seed)
    found = {}
    METHODS[name].apply(one, given, found.__setitem__)
    blocks = [found[start] for start in sorted(found)]
    assert all(block.dtype == models[0].dtype for block in blocks)
    return np.concatenate(blocks).reshape(models[0].shape) if blocks else np.zeros(models[0].shape, models[0].dtype)


def drawn(*shape, seed=0, scale=1.0):
    """Normal numbers, float32."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def fine_tunes(count, *shape, scale=0.3):
    """A base and models near it."""
    base = drawn(*shape)
    return base, [base + drawn(*shape, seed=i + 1, scale=scale) for i in range(count)]


def weights(*values):
    """Weights of models, as their parameters."""
    return [{"weight": value} for value in values]
