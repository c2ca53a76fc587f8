"""Conversion between Hugging Face's tensors and lcx's parameter tree, with one table for both directions.

A linear map is stored in Hugging Face's files as `[outputs, inputs]`, here as `[inputs, outputs]` with heads as a separate axis
and layers stacked. Reading proceeds a few rows at a time, directly into the buffers that become the devices' arrays, so that a
process holds what its devices hold and little more.

Legend: L layers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from lcx.core.errors import UserError
from lcx.core.mesh import fitting_spec
from lcx.core.param_spec import ParamSpec, is_spec, paths_of
from lcx.core.quantized import Hold
from lcx.core.trees import Tree
from lcx.interop.families import Family
from lcx.interop.shards import Tensors, finite, some

Box = tuple[tuple[int, int], ...]
"""Start and end of a piece along every axis."""

_AT_ONCE = 1 << 24
"""How many numbers of a tensor are read at once."""

_TURNED = 16
"""Rows transposed at once: enough to fill whole cache lines in the other direction, and six times as fast as all at once."""

_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints contain and nothing reads."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """The numbers of one layer of one parameter, with shape `shape` in lcx, and their place in the tensor `name`.

    `index` is the layer's number, followed by the expert's; empty for parameters that are not stacked. `inputs` is that of
    `ParamSpec`; if 0, the tensor is stored unchanged (with its axes flattened, if it is a bias). The slot's rows start at `first`,
    out of `rows`.
    """

    path: str
    index: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    inputs: int
    table: bool = False
    first: int = 0
    rows: int = 0

    @property
    def own_rows(self) -> int:
        """Number of rows of the tensor that belong to this slot."""
        return self.shape[0] if self.table else math.prod(self.shape[self.inputs :])

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self.table:
            return self.shape
        return (self.rows, math.prod(self.shape[: self.inputs])) if self.inputs else (self.rows,)

    def fill(self, shards: Tensors, pieces: Mapping[Box, np.ndarray]) -> None:
        """Read into each array of `pieces` the part of the slot in its box.

        The needed rows are read a few at a time, each once however many pieces share them. A box may cut the leading axes of
        the inputs and of the outputs.
        """
        spans = {box: self._spans(box) for box in pieces}
        columns = (min(c.start for _, c in spans.values()), max(c.stop for _, c in spans.values()))
        first, last = min(r.start for r, _ in spans.values()), max(r.stop for r, _ in spans.values())
        step = max(1, _AT_ONCE // max(1, columns[1] - columns[0]))
        with shards.open(self.name) as read:
            for start in range(first, last, step):
                rows = slice(start, min(start + step, last))
                where = slice(self.first + rows.start, self.first + rows.stop)
                stored = read((where, slice(*columns)) if self.flat else (where,))
                for box, (own, cut) in spans.items():
                    lo, hi = max(own.start, rows.start), min(own.stop, rows.stop)
                    if lo < hi:
                        x = stored[lo - rows.start : hi - rows.start]
                        x = x[:, cut.start - columns[0] : cut.stop - columns[0]] if self.flat else x
                        x = x if x.dtype == pieces[box].dtype else _cast(x, pieces[box].dtype, self.name)
                        _assign(self._flat(pieces[box]), slice(lo - own.start, hi - own.start), x, bool(self.inputs))

    @property
    def flat(self) -> bool:
        """Whether the tensor has two axes."""
        return bool(self.inputs) or self.table

    def _spans(self, box: Box) -> tuple[slice, slice]:
        """Rows and columns of the slot's part of the tensor covered by a box."""
        if self.table:
            return slice(*box[0]), slice(*box[1])
        ins, outs = self.shape[: self.inputs], self.shape[self.inputs :]
        rows = _span(box[self.inputs], outs[1:])
        return rows, _span(box[0], ins[1:]) if self.inputs else slice(0, 1)

    def _flat(self, piece: np.ndarray) -> np.ndarray:
        """A piece as a matrix of inputs by outputs, or in the tensor's own shape."""
        if self.table:
            return piece
        return piece.reshape(math.prod(piece.shape[: self.inputs]), -1) if self.inputs else piece.reshape(-1)

    def stored(self, x: np.ndarray) -> np.ndarray:
        """The slot's numbers, given in its shape, as rows of the tensor."""
        if self.table:
            return x
        outs = len(self.shape) - self.inputs
        turned = np.moveaxis(x, range(-outs, 0), range(outs))
        return turned.reshape(self.own_rows, -1) if self.inputs else turned.reshape(-1)


def slots(table: Tree, family: Family, num_layers: int) -> dict[str, list[Slot]]:
    """Tensor name -> its slots in the order in which they fill it, for a table of `model.params.specs`.

    Raises `UserError` for a parameter for which the family has no tensor.
    """
    found: dict[str, list[Slot]] = {}
    order = {path: i for i, path in enumerate(family.names)}
    flat = sorted(paths_of(table), key=lambda item: order.get(item[0].rpartition("/")[0], len(order)))
    for layer in (None, *range(num_layers)):
        for path, spec in flat:
            if path.startswith("layers/") == (layer is not None):
                for slot in _slots(path, spec, layer, family):
                    found.setdefault(slot.name, []).append(slot)
    return {name: _filled(parts) for name, parts in found.items()}


def check(shards: Tensors, wanted: Mapping[str, list[Slot]], tied: bool, described: str = "config.json") -> None:
    """Raises `UserError` listing tensors that are missing, do not belong to the model, or have another shape.

    `described` is what said which tensors there have to be.
    """
    extra = {name for name in shards.shapes if name not in wanted and not _UNUSED.fullmatch(name)}
    if tied and "lm_head.weight" in extra and _is_copy(shards):
        extra.discard("lm_head.weight")
    if tied and "lm_head.weight" in extra:
        raise UserError(
            f"{shards.folder}: config.json says tie_word_embeddings=true, but the files have an lm_head.weight other than the "
            "embedding; set it to false, or remove the tensor"
        )
    lists = {
        "missing": [name for name in wanted if name not in shards.shapes],
        "not of this architecture": sorted(extra),
        "of the wrong shape": [
            f"{name} {shape_text(shards.shapes[name])} instead of {shape_text(parts[0].tensor_shape)}"
            for name, parts in wanted.items()
            if name in shards.shapes and shards.shapes[name] != parts[0].tensor_shape
        ],
    }
    wrong = [f"{what}: {some(names, 8)}" for what, names in lists.items() if names]
    if wrong:
        raise UserError(
            f"{shards.folder}: the tensors do not match its {described}; {'; '.join(wrong)}. "
            f"Was {described} changed, or does a file belong to another model?"
        )


def load(
    shards: Tensors, table: Tree, wanted: Mapping[str, list[Slot]], dtype: str, mesh: Mesh | None = None, hold: Hold | None = None
) -> Tree:
    """The parameters of a table in numpy's `dtype`, each placed on `mesh` (None: the first device) as specified in the table.

    What `hold` makes of one takes its place before the next is read. Every process reads only what its own devices hold. Raises
    `UserError` for numbers that are not finite.
    """
    by_path: dict[str, list[Slot]] = {}
    for parts in wanted.values():
        for slot in parts:
            by_path.setdefault(slot.path, []).append(slot)

    leaves = []
    for path, spec in paths_of(table):
        leaf = _leaf(shards, spec, by_path[path], jnp.dtype(dtype), _sharding(spec, mesh))
        leaves.append(leaf if hold is None else hold(path, leaf))
    return jax.tree.unflatten(jax.tree.structure(table, is_leaf=is_spec), leaves)


def tensor(params: Mapping[str, jax.Array], parts: list[Slot], dtype: str) -> np.ndarray:
    """A whole tensor in numpy's `dtype`, from the leaves of a parameter tree by path."""
    pieces = []
    for slot in parts:
        x = params[slot.path][slot.index] if slot.index else params[slot.path]
        pieces.append(slot.stored(_cast(_on_host(x), dtype, slot.name)))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _slots(path: str, spec: ParamSpec, layer: int | None, family: Family) -> Iterator[Slot]:
    module, _, last = path.rpartition("/")
    if module not in family.names:
        raise UserError(f"the parameter {path} does not exist in {family.architecture}")
    name, ending = family.names[module], "bias" if last == "bias" else "weight"
    prefix = "" if layer is None else f"model.layers.{layer}."
    layers = () if layer is None else (layer,)
    experts = [(i,) for i in range(spec.shape[1])] if "{expert}" in name else [()]
    for expert in experts:
        index = layers + expert
        place = f"{prefix}{name.format(expert=expert[0])}" if expert else f"{prefix}{name}"
        yield Slot(path, index, f"{place}.{ending}", spec.shape[len(index) :], spec.inputs, table=last == "embedding")


def _filled(parts: list[Slot]) -> list[Slot]:
    """Slots of one tensor, with the rows of each filled in."""
    rows, placed = sum(slot.own_rows for slot in parts), []
    for slot in parts:
        first = sum(known.own_rows for known in placed)
        placed.append(dataclasses.replace(slot, first=first, rows=rows))
    return placed


def _leaf(shards: Tensors, spec: ParamSpec, parts: list[Slot], dtype: Any, sharding: Any) -> jax.Array:
    """One parameter, read layer by layer into one buffer for each distinct piece that this process holds."""
    places = {device: _box(index, spec.shape) for device, index in sharding.addressable_devices_indices_map(spec.shape).items()}
    buffers = {box: _aligned(tuple(b - a for a, b in box), dtype) for box in places.values()}

    def read(slot: Slot) -> None:
        here: dict[Box, np.ndarray] = {}
        for box, buffer in buffers.items():
            stacked, own = box[: len(slot.index)], box[len(slot.index) :]
            if all(first <= i < last for i, (first, last) in zip(slot.index, stacked, strict=True)):
                here[own] = buffer[tuple(i - first for i, (first, _) in zip(slot.index, stacked, strict=True))]
        if here:
            slot.fill(shards, here)

    with concurrent.futures.ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for _ in pool.map(read, parts):
            pass
    buffers = [jax.device_put(buffers[box], device) for device, box in places.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(spec.shape, sharding, buffers))


def _cast(x: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Converts numbers to another type; raises `UserError` if they are not finite in it."""
    with np.errstate(over="ignore"):
        found = x.astype(jnp.dtype(dtype))
    if not finite(found):
        reach = f"has numbers out of range for {jnp.dtype(dtype).name}; choose another dtype"
        raise UserError(f"{name} {reach if finite(x) else 'contains NaN or infinity'}")
    return found


def _assign(out: np.ndarray, rows: slice, x: np.ndarray, turned: bool) -> None:
    """Copies rows of a tensor into a piece; as integers if no conversion is needed, which numpy copies faster."""
    if x.dtype == out.dtype:
        whole = np.dtype(f"u{x.dtype.itemsize}")
        out, x = out.view(whole), x.view(whole)
    if not turned:
        out[rows] = x
        return
    for i in range(0, len(x), _TURNED):
        some = x[i : i + _TURNED]
        out[:, rows.start + i : rows.start + i + len(some)] = some.T


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array aligned so that a CPU device can use it without another copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _sharding(spec: ParamSpec, mesh: Mesh | None) -> Any:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, fitting_spec(spec.logical_axes, spec.shape, mesh))


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True))


def _span(piece: tuple[int, int], inner: tuple[int, ...]) -> slice:
    """The part of the flattened axes that a piece of the leading axis covers."""
    size = math.prod(inner)
    return slice(piece[0] * size, piece[1] * size)


def _on_host(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _is_copy(shards: Tensors) -> bool:
    """Whether a tied model's output weights are a copy of the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if any(name not in shards.shapes for name in names) or len({shards.shapes[name] for name in names}) > 1:
        return False
    rows, step = shards.shapes[names[0]][0], 1 << 12
    with shards.open(names[0]) as one, shards.open(names[1]) as other:
        boxes = [(slice(start, min(rows, start + step)), slice(None)) for start in range(0, rows, step)]
        return all(np.array_equal(one(box), other(box)) for box in boxes)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape in readable form."""
    return "x".join(map(str, shape)) or "scalar"
