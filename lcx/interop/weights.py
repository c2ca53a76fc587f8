"""Weights between Hugging Face's tensors and lcx's parameter tree, one table for both directions.

A linear map stands in Hugging Face's files as `[outputs, inputs]`, here as `[inputs, outputs]` with heads as an axis of their own
and layers stacked. Reading goes tensor by tensor, each device's piece for itself, so that a process holds what its devices hold
and one stack of pieces more.

Legend: L layers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from lcx.core.errors import UserError
from lcx.core.mesh import fitting_spec
from lcx.core.params import ParamSpec, paths_of
from lcx.core.trees import Tree, paths
from lcx.interop.families import Family
from lcx.interop.shards import Shards

Box = tuple[slice, ...]

_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints hold and nothing reads."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """The numbers of one layer of one parameter, `shape` there, and their place in the tensor `name`.

    `layer` is None for what is not stacked. `inputs` counts the leading axes of `shape` that are a linear map's inputs, 0 where
    the tensor is stored as it is (with its axes flattened, if it is a bias). The rows are those from `first` on, of `rows`.
    """

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    inputs: int
    table: bool = False
    first: int = 0
    rows: int = 0

    @property
    def own_rows(self) -> int:
        """Rows of the tensor that are this slot's."""
        return self.shape[0] if self.table else math.prod(self.shape[self.inputs :])

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self.table:
            return self.shape
        return (self.rows, math.prod(self.shape[: self.inputs])) if self.inputs else (self.rows,)

    def read(self, shards: Shards, box: Box) -> np.ndarray:
        """The piece `box` of the slot, in the stored type; a view that may be strided."""
        if self.table:
            return shards.read(self.name, box)
        ins, outs = self.shape[: self.inputs], self.shape[self.inputs :]
        rows = _span(box[self.inputs], outs[1:], self.first)
        if not self.inputs:
            x = shards.read(self.name, (rows,))
            return x.reshape(-1, *outs[1:])[(slice(None), *box[1:])]
        x = shards.read(self.name, (rows, _span(box[0], ins[1:], 0))).reshape(-1, *outs[1:], *self._columns(box))
        x = np.moveaxis(x, range(len(outs)), range(-len(outs), 0))
        inner = (slice(None), *box[1 : self.inputs], slice(None), *box[self.inputs + 1 :])
        return x[inner]

    def stored(self, x: np.ndarray) -> np.ndarray:
        """The slot's numbers, of its shape, as rows of the tensor."""
        if self.table:
            return x
        outs = len(self.shape) - self.inputs
        turned = np.moveaxis(x, range(-outs, 0), range(outs))
        return turned.reshape(self.own_rows, -1) if self.inputs else turned.reshape(-1)

    def _columns(self, box: Box) -> tuple[int, ...]:
        size = box[0].stop - box[0].start
        return (size, *self.shape[1 : self.inputs])


def slots(table: Tree, family: Family, num_layers: int) -> dict[str, list[Slot]]:
    """Tensor name -> its slots, in the order in which they fill it, for a table of `model.params.specs`.

    Raises `UserError` for a parameter that the family has no tensor for.
    """
    found: dict[str, list[Slot]] = {}
    order = {path: i for i, path in enumerate(family.names)}
    flat = sorted(paths_of(table), key=lambda item: order.get(item[0].rpartition("/")[0], len(order)))
    for layer in (None, *range(num_layers)):
        for path, spec in flat:
            if path.startswith("layers/") == (layer is not None):
                slot = _slot(path, spec, layer, family)
                found.setdefault(slot.name, []).append(slot)
    return {name: _filled(parts) for name, parts in found.items()}


def check(shards: Shards, wanted: Mapping[str, list[Slot]], tied: bool) -> None:
    """Raises `UserError` that lists tensors which are missing, not the model's, or of another shape."""
    extra = {name for name in shards.shapes if name not in wanted and not _UNUSED.fullmatch(name)}
    if tied and "lm_head.weight" in extra and _is_copy(shards):
        extra.discard("lm_head.weight")
    lists = {
        "missing": [name for name in wanted if name not in shards.shapes],
        "not of this architecture": sorted(extra),
        "misshapen": [
            f"{name} {_text(shards.shapes[name])} where {_text(parts[0].tensor_shape)} is due"
            for name, parts in wanted.items()
            if name in shards.shapes and shards.shapes[name] != parts[0].tensor_shape
        ],
    }
    wrong = [f"{what}: {_list(names)}" for what, names in lists.items() if names]
    if wrong:
        raise UserError(
            f"{shards.folder}: the tensors are not those that its config.json describes; {'; '.join(wrong)}. "
            "Was config.json changed, or is a file of another model among them?"
        )


def load(shards: Shards, table: Tree, wanted: Mapping[str, list[Slot]], dtype: str, mesh: Mesh | None = None) -> Tree:
    """The parameters of a table in numpy's `dtype`, each placed on `mesh` (None: the first device) as the table says.

    Every process reads the pieces of its own devices. Numbers that are not finite raise `UserError`.
    """
    by_path: dict[str, list[Slot]] = {}
    for parts in wanted.values():
        for slot in parts:
            by_path.setdefault(slot.path, []).append(slot)

    leaves = [_leaf(shards, spec, by_path[path], jnp.dtype(dtype), _sharding(spec, mesh)) for path, spec in paths_of(table)]
    return jax.tree.unflatten(jax.tree.structure(table, is_leaf=lambda x: isinstance(x, ParamSpec)), leaves)


def tensor(params: Mapping[str, jax.Array], parts: list[Slot], dtype: str) -> np.ndarray:
    """A whole tensor in numpy's `dtype`, from the leaves of a parameter tree by path."""
    pieces = []
    for slot in parts:
        leaf = params[slot.path]
        x = leaf if slot.layer is None else leaf[slot.layer]
        pieces.append(slot.stored(_on_host(x)).astype(jnp.dtype(dtype)))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def leaves_by_path(params: Tree) -> dict[str, jax.Array]:
    """The leaves of a parameter tree by their path."""
    return dict(paths(params))


def count(slot: Slot) -> int:
    """Numbers of a slot."""
    return math.prod(slot.shape)


def _slot(path: str, spec: ParamSpec, layer: int | None, family: Family) -> Slot:
    module, _, last = path.rpartition("/")
    if module not in family.names:
        raise UserError(f"the parameter {path} has no place in {family.architecture}")
    prefix = "" if layer is None else f"model.layers.{layer}."
    ending = "bias" if last == "bias" else "weight"
    shape = spec.shape if layer is None else spec.shape[1:]
    inputs = 0 if last != "kernel" else 2 if module.endswith("attention/out") else 1
    return Slot(path, layer, f"{prefix}{family.names[module]}.{ending}", shape, inputs, table=last == "embedding")


def _filled(parts: list[Slot]) -> list[Slot]:
    """Slots of one tensor with the rows that each has."""
    rows, placed = sum(slot.own_rows for slot in parts), []
    for slot in parts:
        first = sum(known.own_rows for known in placed)
        placed.append(dataclasses.replace(slot, first=first, rows=rows))
    return placed


def _leaf(shards: Shards, spec: ParamSpec, parts: list[Slot], dtype: Any, sharding: Any) -> jax.Array:
    """One parameter, read layer by layer into a buffer for each different piece that this process holds."""
    places = sharding.addressable_devices_indices_map(spec.shape)
    boxes = {device: _box(index, spec.shape) for device, index in places.items()}
    buffers = {key: np.empty([s.stop - s.start for s in box], dtype) for key, box in ((_key(box), box) for box in boxes.values())}
    unique = {_key(box): box for box in boxes.values()}
    for slot in parts:
        for key, box in unique.items():
            if slot.layer is None:
                buffers[key][...] = slot.read(shards, box)
            elif box[0].start <= slot.layer < box[0].stop:
                buffers[key][slot.layer - box[0].start] = slot.read(shards, box[1:])
    left = [_key(box) for box in boxes.values()]
    arrays = []
    for device, box in boxes.items():
        key = _key(box)
        left.remove(key)
        arrays.append(jax.block_until_ready(jax.device_put(buffers[key], device)))
        if key not in left:
            del buffers[key]
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def _sharding(spec: ParamSpec, mesh: Mesh | None) -> Any:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, fitting_spec(spec.logical_axes, spec.shape, mesh))


def _box(index: Box, shape: tuple[int, ...]) -> Box:
    return tuple(slice(*piece.indices(size)[:2]) for piece, size in zip(index, shape, strict=True))


def _key(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((piece.start, piece.stop) for piece in box)


def _span(piece: slice, inner: tuple[int, ...], first: int) -> slice:
    """Rows (or columns) of the flattened axes, of which the leading one is cut to `piece`."""
    size = math.prod(inner)
    return slice(first + piece.start * size, first + piece.stop * size)


def _on_host(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _is_copy(shards: Shards) -> bool:
    """Is a tied model's output the embedding once more?"""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if any(name not in shards.shapes for name in names) or len({shards.shapes[name] for name in names}) > 1:
        return False
    rows = shards.shapes[names[0]][0]
    step = 1 << 12
    boxes = [(slice(start, min(rows, start + step)), slice(None)) for start in range(0, rows, step)]
    return all(np.array_equal(*(shards.read(name, box) for name in names)) for box in boxes)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
