"""Adapters in the files of peft, adapter_config.json and adapter_model.safetensors, read as part of a model.

peft names a module as torch does, below `base_model.model.`, and stores torch's layout: `lora_A.weight` `[r, in]`, `lora_B.weight`
`[out, r]`, `lora_embedding_A` `[r, V]`, `lora_embedding_B` `[D, r]`, `lora_magnitude_vector` `[out]`. What was trained in full
comes along whole. Where a fused projection (Phi 3's `qkv_proj`) is several kernels here, each gets the first matrix of its adapter.

Legend: r rank, L layers, V vocabulary, D model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lcx.adapters import lora
from lcx.core import manifest
from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.core.quantized import Hold
from lcx.core.trees import Tree, map_paths
from lcx.interop import folder as hf
from lcx.interop import hf_config, weights
from lcx.interop.folder import HfFolder
from lcx.interop.hf_config import Described
from lcx.interop.shards import Shards
from lcx.interop.weights import Slot

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lcx_adapter.json"
PREFIX = "base_model.model."
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"

_READ = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "base_model_name_or_path",
    "target_modules", "modules_to_save", "bias", "layers_to_transform", "layers_pattern", "exclude_modules",
))  # fmt: skip
_NO_EFFECT = frozenset((
    "task_type", "revision", "inference_mode", "lora_dropout", "init_lora_weights", "peft_version", "auto_mapping", "megatron_core",
    "eva_config", "loftq_config", "corda_config", "ensure_weight_tying", "qalora_group_size", "runtime_config", "lora_ga_config",
))  # fmt: skip
"""Keys that change nothing once an adapter is trained."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")
"""Values of `init_lora_weights` with which peft also changes the weights below."""

NAME = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+?)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    + r"|base_layer\.weight|base_layer\.bias|weight|bias)"
)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter of peft's."""
    return (Path(path) / CONFIG).is_file()


class PeftFolder:
    """An adapter's folder with the model that it belongs to, as one model.

    `base` names that model; by default it is what the adapter says. Positions are those of the folder's own config.json if it has
    one, as those that lcx writes do. Raises `UserError` for what lcx would not compute as peft does, and for tensors that do not
    belong to the model.
    """

    def __init__(self, folder: str | Path, base: str | Path | None = None):
        self.folder = Path(folder)
        hf.check_folder(self.folder)
        self.settings = settings_of(self.folder)
        self.base = HfFolder(_base(self.folder, self.settings) if base is None else base)
        self.described: Described = self.base.described
        if (self.folder / hf_config.FILE).is_file():
            self.described = hf_config.read_file(self.folder)
            if self.described.model != self.base.described.model:
                raise UserError(f"{self.folder / hf_config.FILE} describes another model than the one in {self.base.folder}")
        self.shards = Shards(self.folder, WEIGHTS)
        self._modules = by_module(self.base.slots)
        self._found = self._sorted()

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return [*self.base.files, *self.shards.files]

    @property
    def dtype(self) -> str:
        """numpy's name of the dtype of the base's weights."""
        return self.base.dtype

    def params(self, dtype: str | None = None, mesh: Mesh | None = None, hold: Hold | None = None) -> Tree:
        """The parameters with the adapter folded in, in numpy's `dtype` (None: the base's) on `mesh` (None: the first device), each
        as `hold` makes it."""
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype or self.dtype)), lora.fold(self.unfolded(mesh)))
        return params if hold is None else map_paths(hold, params)

    def unfolded(self, mesh: Mesh | None = None) -> Tree:
        """The base's parameters, float32, with the adapters beside them and what was trained in full in its place."""
        flat = flax.traverse_util.flatten_dict(self.base.params("float32", mesh), sep="/")
        replaced: dict[str, np.ndarray] = {}
        for name, parts in self.base.slots.items():
            if (whole := self._whole(name)) is not None:
                for slot in parts:
                    target = replaced.setdefault(slot.path, np.array(flat[slot.path]))
                    target[slot.index or ...] = _unstored(slot, whole[slot.first : slot.first + slot.own_rows])
        flat |= {path: jax.device_put(x, flat[path].sharding) for path, x in replaced.items()}
        adapters: dict[str, list[tuple[tuple[int, ...], dict[str, np.ndarray]]]] = {}
        for module, parts in self._modules.items():
            for slot in parts:
                if (found := self._adapter(module, slot)) is not None:
                    adapters.setdefault(slot.path, []).append((slot.index, found))
        for path, found in adapters.items():
            flat |= _stacked(path, found, flat[path].shape[: len(found[0][0])])
        tree = flax.traverse_util.unflatten_dict(flat, sep="/")
        if not self.settings["use_dora"]:
            return tree
        return _with_magnitudes(tree)

    def _sorted(self) -> dict[str, dict[str, str]]:
        """Module -> what there is of it -> the tensor's name; raises `UserError` for tensors that are not of the model."""
        found: dict[str, dict[str, str]] = {}
        copy = f"{PREFIX}{HEAD}.weight" if self.described.model.tied_embeddings else None
        for name in self.shards.shapes:
            if name == copy:
                continue
            match = NAME.fullmatch(name)
            if match is None or match["module"] not in self._modules:
                what = "lora_B.bias, which lcx does not apply" if name.endswith("lora_B.bias") else "not a module of the base"
                other = f"was the adapter trained for another model than {self.base.folder}?"
                raise UserError(f"{self.folder / WEIGHTS} has {name}, {what}; {other}")
            found.setdefault(match["module"], {})[match["what"]] = name
        for module, tensors in found.items():
            for one, other in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
                if (one in tensors) != (other in tensors):
                    there, lacks = (one, other) if one in tensors else (other, one)
                    raise UserError(f"{self.folder / WEIGHTS} has {module}.{there} but not its {lacks}; the file is incomplete")
            self._check_shapes(module, tensors)
        self._check_tied(found, copy)
        return found

    def _check_tied(self, found: Mapping[str, Mapping[str, str]], copy: str | None) -> None:
        table = found.get(EMBEDDINGS, {}).get("weight")
        own = copy if copy in self.shards.shapes else None
        if copy is None or table is None and own is None:
            return
        if table is None or own is None or not np.array_equal(self.shards.read(table), self.shards.read(own)):
            raise UserError(
                f"{self.folder / WEIGHTS} trains one of {EMBEDDINGS} and {HEAD} apart from the other, but the base has one table "
                "for both; train it with ensure_weight_tying in peft, or fold the adapter there (merge_and_unload)"
            )

    def _check_shapes(self, module: str, tensors: Mapping[str, str]) -> None:
        parts = self._modules[module]
        rows, columns = (*parts[0].tensor_shape, 0)[:2]
        rank = self._rank(module)
        wanted = {
            "lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank), "lora_magnitude_vector": (rows,),
            "lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank), "base_layer.weight": (rows, columns),
        }  # fmt: skip
        for what, name in tensors.items():
            shape = self.shards.shapes[name]
            if what in wanted and shape != wanted[what]:
                raise UserError(
                    f"{self.folder / WEIGHTS}: {name} is {weights.shape_text(shape)}, but by the base and {CONFIG} it should be "
                    f"{weights.shape_text(wanted[what])}; the adapter is of another model or of another rank"
                )
            if what == "lora_magnitude_vector" and parts[0].table:
                raise UserError(f"{name}: DoRA of a table of embeddings is not supported; train that table in full instead")
            if what.startswith("lora_embedding") and self.described.model.tied_embeddings:
                raise UserError(
                    f"{name} adapts a table of embeddings that is also the output layer, which peft leaves as it is; lcx has one "
                    "table for both, so train it in full (modules_to_save) instead"
                )

    def _whole(self, name: str) -> np.ndarray | None:
        """A tensor of the base that the adapter replaces."""
        module, _, ending = name.rpartition(".")
        tensors = self._found.get(module, {})
        own = tensors.get(ending) or tensors.get(f"base_layer.{ending}")
        if own is None:
            return None
        found, wanted = self.shards.read(own).astype(np.float32), self.base.slots[name][0].tensor_shape
        if found.shape != wanted:
            raise UserError(f"{own} is {weights.shape_text(found.shape)} and not {weights.shape_text(wanted)}, as in the base")
        return found

    def _adapter(self, module: str, slot: Slot) -> dict[str, np.ndarray] | None:
        """An adapter's arrays in lcx's layout, for the part of its module that a slot is."""
        tensors = self._found.get(module, {})
        read = {what: self.shards.read(name).astype(np.float32) for what, name in tensors.items() if what.startswith("lora_")}
        if not read:
            return None
        rank = self._rank(module)
        scale = np.float32(self._alpha(module) / (math.sqrt(rank) if self.settings["use_rslora"] else rank))
        if slot.table:
            return {"a": read["lora_embedding_A"].T, "b": read["lora_embedding_B"].T, "scale": scale}
        ins, outs = slot.shape[: slot.inputs], slot.shape[slot.inputs :]
        own = slice(slot.first, slot.first + slot.own_rows)
        found = {"a": read["lora_A.weight"].T.reshape(*ins, rank), "b": read["lora_B.weight"][own].T.reshape(rank, *outs)}
        if "lora_magnitude_vector" in read:
            found["magnitude"] = read["lora_magnitude_vector"][own].reshape(outs)
        return {**found, "scale": scale}

    def _rank(self, module: str) -> int:
        return of_pattern(self.settings["rank_pattern"], module, self.settings["r"])

    def _alpha(self, module: str) -> float:
        return of_pattern(self.settings["alpha_pattern"], module, self.settings["lora_alpha"])


def settings_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json with peft's defaults filled in; raises `UserError` for what lcx does not compute."""
    values = hf_config.read_json(folder / CONFIG)
    where = folder / CONFIG
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type={values.get('peft_type')!r} is not supported; lcx reads adapters of type 'LORA'")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise UserError(
            f"{where}: init_lora_weights={init!r} changes the base's weights too; convert the adapter with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key, value in values.items():
        if key not in _READ | _NO_EFFECT and value not in (None, False, {}, []):
            raise UserError(f"{where}: {key}={value!r} is not supported; fold the adapter with peft (merge_and_unload) instead")
    choice(f"{where}: bias", values.get("bias", "none"), ("none", "all", "lora_only"))
    defaults = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False}
    found = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    for key in ("r", "lora_alpha"):
        if not isinstance(found[key], int | float) or found[key] <= 0:
            raise UserError(f"{where}: {key}={found[key]!r} must be a number above 0")
    return found


def _base(folder: Path, settings: Mapping[str, Any]) -> Path:
    name = settings.get("base_model_name_or_path")
    places = [] if not name else [Path(name), folder / str(name)]
    found = next((path for path in places if hf.is_folder(path)), None)
    if found is None:
        listed = (folder / manifest.NAME).is_file()
        accepted = f", then accept that with: lcx verify {folder} --update" if listed else ""
        raise UserError(
            f"{folder / CONFIG}: base_model_name_or_path={name!r} is not a model's folder here; fetch that model and write the "
            f"path of its folder there{accepted}"
        )
    return found


def of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: a key is a regular expression for the end of a module's name, at a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def by_module(slots: Mapping[str, list[Slot]]) -> dict[str, list[Slot]]:
    """Module -> the slots of its weight that are tables or matrices, or of a vector."""
    return {name.removesuffix(".weight"): parts for name, parts in slots.items() if name.endswith(".weight")}


def _unstored(slot: Slot, rows: np.ndarray) -> np.ndarray:
    """Rows of a tensor in the slot's shape; the inverse of `Slot.stored`."""
    if slot.table or not slot.inputs:
        return rows.reshape(slot.shape)
    ins, outs = slot.shape[: slot.inputs], slot.shape[slot.inputs :]
    return np.moveaxis(rows.reshape(*outs, *ins), range(len(outs)), range(-len(outs), 0))


def _stacked(
    path: str, found: Sequence[tuple[tuple[int, ...], dict[str, np.ndarray]]], stack: tuple[int, ...]
) -> dict[str, jax.Array]:
    """The adapters of a kernel by their index, layer and expert, as arrays `[*stack, ...]`; zeros fill up lower ranks."""
    module = path.rpartition("/")[0]
    rank = max(one["a"].shape[-1] for _, one in found)
    first = found[0][1]
    arrays = {
        "a": np.zeros((*stack, *first["a"].shape[:-1], rank), np.float32),
        "b": np.zeros((*stack, rank, *first["b"].shape[1:]), np.float32),
        "scale": np.zeros(stack, np.float32),
    }
    if any("magnitude" in one for _, one in found):
        # Not a number where a layer has none: its norms take that place.
        arrays["magnitude"] = np.full((*stack, *first["b"].shape[1:]), np.nan, np.float32)
    for index, one in found:
        own = one["a"].shape[-1]
        arrays["a"][index][..., :own], arrays["b"][index][:own] = one["a"], one["b"]
        arrays["scale"][index] = one["scale"]
        if "magnitude" in one:
            arrays["magnitude"][index] = one["magnitude"]
    return {f"{module}/{lora.LORA}/{name}": jnp.asarray(x) for name, x in arrays.items()}


def _with_magnitudes(params: Tree) -> Tree:
    """Magnitudes that the adapter has, and the norms of the kernels for layers without one."""
    own, norms = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, lora.start(params)))
    for path, x in own.items():
        if path.endswith("/magnitude"):
            own[path] = jnp.where(jnp.isnan(x), norms[path], x)
    return flax.traverse_util.unflatten_dict(own, sep="/")
