"""Adapters written in the files of peft, for peft and the programs that read its adapters.

Kernels that are one tensor there (Phi 3's `qkv_proj`) get one adapter, whose second matrix is block-diagonal.

Legend: r rank.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from lcx.adapters import lora
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.trees import Tree
from lcx.interop import folder as hf
from lcx.interop import hf_config, weights
from lcx.interop.folder import HfFolder
from lcx.interop.hf_config import Described
from lcx.interop.peft import CONFIG, EMBEDDINGS, HEAD, PREFIX, RECORD, WEIGHTS, by_module
from lcx.interop.shards import some
from lcx.interop.weights import Slot

SHAPES = ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "num_experts")
"""What a base has in common with the model that its adapter was trained over."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What an adapter's folder is written from: the model with its adapters unfolded, and which parameters were trained.

    `rank_stabilized` scales by alpha / √rank. `trained` holds paths, those of adapters included.
    """

    params: Tree
    trained: frozenset[str]
    rank_stabilized: bool = False


def save(out: Path, adapted: Adapted, described: Described, base: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write an adapter's folder; returns its adapter_config.json.

    `described` has the positions that the adapter was trained with, which a config.json beside it says to transformers, with
    `base`'s other keys. `record` is what else lcx knows of them. Raises `UserError` if `out` exists, for a base of other shapes,
    and for what peft cannot express; warns of one with other weights.
    """
    hf.check_new(out)
    below, flat = HfFolder(base), flax.traverse_util.flatten_dict(adapted.params, sep="/")
    _check_base(below, flat, adapted, described)
    values = hf_config.write(described.model, described.schemes, described.length, "float32", hf_config.values_of(base), None, None)
    tensors, settings = _written(below.slots, flat, adapted, described)
    settings = {**settings, "base_model_name_or_path": str(base.absolute())}
    if jax.process_index() != 0:
        return settings
    from safetensors.numpy import save_file

    with hf.created(out, sum(x.nbytes for x in tensors.values())) as part:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, part / WEIGHTS, metadata={"format": "pt"})
        for name, content in ((CONFIG, settings), (RECORD, dict(record)), (hf_config.FILE, values)):
            text = json.dumps(content, indent=2, sort_keys=name == CONFIG)
            (part / name).write_text(text + "\n", encoding="utf-8")
        hf.copy_companions(base, part, described.length)
    return settings


def _check_base(base: HfFolder, flat: Mapping[str, Any], adapted: Adapted, described: Described) -> None:
    for name in SHAPES:
        ours, theirs = (getattr(model, name) for model in (described.model, base.described.model))
        if ours != theirs:
            raise UserError(
                f"the adapters were trained over a model with {name}={ours}, and {base.folder} has {name}={theirs}; name a folder "
                "of their own base with --base"
            )

    def is_compared(parts: list[Slot]) -> bool:
        plain = all(isinstance(flat.get(slot.path), jax.Array | np.ndarray) and slot.path not in adapted.trained for slot in parts)
        return plain and not parts[0].table and len(parts[0].tensor_shape) == 2

    name = next((name for name, parts in base.slots.items() if is_compared(parts)), None)
    if name is None:
        return
    ours = weights.tensor(flat, base.slots[name], "float32")
    with base.shards.open(name) as read:
        theirs = np.asarray(read((slice(None),)), np.float32)
    # A copy in bfloat16 differs by half a percent at most.
    if (share := float(np.abs(ours - theirs).mean() / np.abs(ours).mean())) > 0.02:
        warn(f"{base.folder} is not the base that the adapters were trained over: {name} differs by {share:.0%}")


def _written(
    slots: Mapping[str, list[Slot]], flat: Mapping[str, Any], adapted: Adapted, described: Described
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of an adapter, and its settings."""
    modules = by_module(slots)
    targeted = {module for module, parts in modules.items() if any(_lora_path(slot, "a") in flat for slot in parts)}
    tensors, sizes, saved = {}, {}, set()
    for name, parts in slots.items():
        module, _, ending = name.rpartition(".")
        whole = any(slot.path in adapted.trained for slot in parts)
        if any(len(slot.index) > 1 for slot in parts) and (whole or module in targeted) or whole and "/router/" in parts[0].path:
            raise UserError(
                f"{parts[0].path} was trained, and transformers stores experts in one tensor that peft does not name; export the "
                "whole model with --format=hf, or adapt attention only"
            )
        if ending == "weight" and module in targeted:
            own, sizes[module] = _adapter_tensors(flat, parts, adapted.rank_stabilized)
            if module == HEAD or parts[0].table:
                own["base_layer.weight"] = weights.tensor(flat, parts, "float32")
            tensors |= {f"{PREFIX}{module}.{what}": x for what, x in own.items()}
        elif whole:
            layer = ".base_layer" if module in targeted else ""
            tensors[f"{PREFIX}{module}{layer}.{ending}"] = weights.tensor(flat, parts, "float32")
            if ending == "weight":
                saved.add(module)
    for module in saved:
        if (bias := f"{module}.bias") in slots:
            tensors[f"{PREFIX}{bias}"] = weights.tensor(flat, slots[bias], "float32")
    settings = as_config(sizes, saved, adapted.rank_stabilized, any("/magnitude" in path for path in flat))
    if described.model.tied_embeddings and EMBEDDINGS in saved:
        # Otherwise peft gives the output layer a table of its own, as it was before the training.
        tensors[f"{PREFIX}{HEAD}.weight"] = tensors[f"{PREFIX}{EMBEDDINGS}.weight"]
        settings["ensure_weight_tying"] = True
    return tensors, {**settings, "bias": _biases(slots, adapted.trained, targeted, saved)}


def _biases(slots: Mapping[str, list[Slot]], trained: frozenset[str], targeted: set[str], saved: set[str]) -> str:
    """peft's word for the biases that were trained."""
    have = {name.removesuffix(".bias") for name in slots if name.endswith(".bias")} - saved
    own = {module for module in have if any(slot.path in trained for slot in slots[f"{module}.bias"])}
    for word, modules in (("none", set()), ("all", have), ("lora_only", have & targeted)):
        if own == modules:
            return word
    raise UserError(
        f"the biases of {some(sorted(own), 3)} were trained but not others, and peft can save all, those of adapted modules or "
        "none; export the whole model with --format=hf"
    )


def _adapter_tensors(flat: Mapping[str, Any], parts: Sequence[Slot], rank_stabilized: bool) -> tuple[dict[str, np.ndarray], tuple]:
    """One module's tensors without its name, and its rank and alpha."""
    mine = [slot for slot in parts if _lora_path(slot, "a") in flat]
    arrays = [{what: _of_layer(flat, slot, what) for what in ("a", "b", "scale", "magnitude")} for slot in mine]
    if parts[0].table:
        a, b, scale = (arrays[0][what] for what in ("a", "b", "scale"))
        rank = a.shape[-1]
        found = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
        return found, (rank, float(scale) * (math.sqrt(rank) if rank_stabilized else rank))
    total = sum(x["a"].shape[-1] for x in arrays)
    # Several kernels in one module share a scale, so that of each goes into its second matrix.
    scale = float(arrays[0]["scale"]) if len(parts) == 1 else 1.0
    first = np.concatenate([x["a"].reshape(-1, x["a"].shape[-1]).T for x in arrays])
    second, at = np.zeros((parts[0].tensor_shape[0], total), np.float32), 0
    for slot, x in zip(mine, arrays, strict=True):
        rank = x["b"].shape[0]
        rows = slice(slot.first, slot.first + slot.own_rows)
        second[rows, at : at + rank] = x["b"].reshape(rank, -1).T * (1.0 if len(parts) == 1 else x["scale"])
        at += rank
    found = {"lora_A.weight": first, "lora_B.weight": second}
    if arrays[0]["magnitude"] is not None:
        if len(mine) < len(parts):
            raise UserError(
                f"{mine[0].path} has an adapter with DoRA, but another part of {mine[0].name} has none, which peft cannot express; "
                "adapt all parts of it"
            )
        found["lora_magnitude_vector"] = np.concatenate([x["magnitude"].reshape(-1) for x in arrays])
    return found, (total, scale * (math.sqrt(total) if rank_stabilized else total))


def as_config(sizes: Mapping[str, tuple[int, float]], saved: set[str], rank_stabilized: bool, dora: bool) -> dict[str, Any]:
    """adapter_config.json; the rank and alpha that most modules have are `r` and `lora_alpha`, others are patterns."""
    ranks, alphas = ({module: pair[i] for module, pair in sizes.items()} for i in (0, 1))
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "alpha_pattern": _pattern(alphas, alpha), "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "lora_alpha": alpha, "lora_bias": False,
        "lora_dropout": 0.0, "modules_to_save": sorted({last(module) for module in saved}) or None, "peft_type": "LORA", "r": rank,
        "rank_pattern": _pattern(ranks, rank), "revision": None, "target_modules": sorted({last(module) for module in sizes}),
        "task_type": "CAUSAL_LM", "use_dora": dora, "use_rslora": rank_stabilized,
    }  # fmt: skip


def last(module: str) -> str:
    """The name by which peft finds a module in all layers; it takes every module whose name ends so, as all norms end in `norm`."""
    return module if module == "model.norm" else module.rpartition(".")[2]


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """What differs from the usual value, by the modules' last names where these agree in all layers."""
    by_last: dict[str, set] = {}
    for module, value in values.items():
        by_last.setdefault(last(module), set()).add(value)
    found = {}
    for module, value in values.items():
        if len(by_last[last(module)]) > 1:
            found |= {module: value} if value != usual else {}
        elif value != usual:
            found[last(module)] = value
    return found


def _lora_path(slot: Slot, what: str) -> str:
    return f"{slot.path.rpartition('/')[0]}/{lora.LORA}/{what}"


def _of_layer(flat: Mapping[str, Any], slot: Slot, what: str) -> np.ndarray | None:
    found = flat.get(_lora_path(slot, what))
    return None if found is None else np.asarray(found[slot.index] if slot.index else found, np.float32)
