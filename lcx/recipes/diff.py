"""Two models side by side: which weights differ, by how much, and which options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from lcx.core.console import say, table
from lcx.core.trees import paths
from lcx.interop.weights import shape_text
from lcx.model.config import ModelConfig
from lcx.recipes import models
from lcx.training.loading import Loaded


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """One row of a comparison: a parameter's path, its shapes (None: absent), and how far apart its numbers are."""

    path: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    largest: float = 0.0
    reference: float = 0.0
    changed: int = 0

    @property
    def same(self) -> bool:
        """Equal in shape and in every number."""
        return self.shapes[0] == self.shapes[1] and not self.changed


def diff(first: str, second: str, show_all: bool = False) -> bool:
    """Print where two models differ, in weights, options and positions; True where they do not."""
    one, other = (models.load(path) for path in (first, second))
    options = list(config_differences(one, other))
    if options:
        table("options that differ", ("option", first, second), options)
    rows = list(differences(one, other))
    shown = [row for row in rows if show_all or not row.same]
    if shown:
        table(
            "tensors" if show_all else "tensors that differ",
            ("tensor", "shape", "numbers that differ", "largest difference", "largest number"),
            [_row(row) for row in shown],
        )
    different = sum(not row.same for row in rows)
    noun = "option differs" if len(options) == 1 else "options differ"
    say(f"{len(rows) - different} of {len(rows)} tensors are equal, {len(options)} {noun}")
    return not different and not options


def differences(one: Loaded, other: Loaded) -> Iterator[TensorDifference]:
    """The parameters of two models compared one by one, in float32."""
    a, b = dict(paths(one.params)), dict(paths(other.params))
    for path in sorted({*a, *b}):
        x, y = a.get(path), b.get(path)
        shapes = tuple(None if leaf is None else tuple(leaf.shape) for leaf in (x, y))
        if shapes[0] != shapes[1]:
            yield TensorDifference(path, shapes)
            continue
        gap = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
        changed = int(jnp.sum(gap != 0, dtype=jnp.float32))
        yield TensorDifference(path, shapes, float(jnp.max(gap)), float(jnp.max(jnp.abs(x))), changed)


def config_differences(one: Loaded, other: Loaded) -> Iterator[tuple[str, object, object]]:
    """Fields of the two models, and their positions, that are not the same."""
    for field in dataclasses.fields(ModelConfig):
        if field.name == "router_aux_weight":  # of training; a Hugging Face folder has none
            continue
        a, b = (getattr(loaded.run.model, field.name) for loaded in (one, other))
        if a != b:
            yield f"model.{field.name}", a, b
    kinds = sorted({*one.meta.positions, *other.meta.positions})
    for kind in kinds:
        a, b = (loaded.meta.positions.get(kind) for loaded in (one, other))
        if a != b:
            yield f"positions.{kind}", _short(a, b), _short(b, a)
    if one.meta.length != other.meta.length:
        yield "length", one.meta.length, other.meta.length


def _row(row: TensorDifference) -> tuple[str, ...]:
    if row.shapes[0] != row.shapes[1]:
        texts = ["absent" if shape is None else shape_text(shape) for shape in row.shapes]
        return row.path, " and ".join(texts), "", "", ""
    share = f"{row.changed:,} of {math.prod(row.shapes[0] or ()):,}"
    return row.path, shape_text(row.shapes[0] or ()), share, f"{row.largest:.3g}", f"{row.reference:.3g}"


def _short(values: object, other: object) -> object:
    """Of two settings only what differs."""
    if not isinstance(values, dict) or not isinstance(other, dict):
        return values
    return {key: value for key, value in values.items() if key == "name" or value != other.get(key)}
