"""The models of a merge: their folders, and whether they may be merged at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx.core.errors import UserError
from lcx.core.gguf import is_gguf
from lcx.interop import hf_config
from lcx.interop.families import FAMILIES, NO_EFFECT, ROPE_KEYS, changes_nothing
from lcx.interop.folder import check_folder, tokenizer_files
from lcx.merging.tensors import Reader

LAYER = re.compile(r"(?P<before>(?:.*\.)?(?:layers|h|blocks)\.)(?P<layer>\d+)(?P<after>\..+)")
"""A layer's tensor; experts have numbers of their own behind that of their layer."""

UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that nothing reads."""

HEAD = "lm_head.weight"
LENGTH = hf_config.LENGTH
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers")
"""Keys of config.json about single layers."""


class Model:
    """A folder of safetensors with a config.json. `name` is what the YAML file calls it.

    Raises `UserError` for a folder that is missing or holds no such model.
    """

    def __init__(self, name: str):
        self.name, self.folder = name, Path(name).expanduser()
        if is_gguf(self.folder) and self.folder.exists():
            raise UserError(
                f"{name} is a GGUF file, but lcx merge, extract and apply read Hugging Face folders; write it as one with "
                f"`lcx export --checkpoint={name} --out=FOLDER`, and name that folder"
            )
        if not self.folder.is_dir():
            hint = "fetch a model first, for example with huggingface_hub's `hf download`, and name its folder"
            raise UserError(f"{name} does not exist or is not a directory; {hint}")
        check_folder(self.folder)
        self.values = hf_config.values_of(self.folder)
        self.reader = Reader(self.folder)
        tied = _full(self.values).get("tie_word_embeddings") is True
        shapes = self.reader.shards.shapes
        self.shapes = {key: shape for key, shape in shapes.items() if not UNUSED.fullmatch(key) and not (tied and key == HEAD)}
        """Tensor name -> shape, of all tensors that count."""
        self._by_layer: dict[int, dict[str, str]] = {}
        self.others: list[str] = []
        """The tensors outside all layers."""
        for key in self.shapes:
            if match := LAYER.fullmatch(key):
                self._by_layer.setdefault(int(match["layer"]), {})[f"{match['before']}*{match['after']}"] = key
            else:
                self.others.append(key)
        self.layers = 1 + max(self._by_layer, default=-1)

    def layer(self, number: int) -> dict[str, str]:
        """The tensors of one layer: what is left of a name without the number -> name."""
        return self._by_layer.get(number, {})


def same_architecture(models: Sequence[Model], whole: bool) -> None:
    """Raises `UserError` for models that compute differently, or, if they are merged as a `whole`, have not as many layers."""
    first = models[0]
    for other in models[1:]:
        for key in ("model_type", "architectures"):
            if first.values.get(key) != other.values.get(key):
                raise _different(
                    first, other, key, first.values.get(key), other.values.get(key), "choose models of one architecture"
                )
        sizes = [model.values.get("vocab_size") for model in (first, other)]
        if sizes[0] != sizes[1]:
            way = "give them one vocabulary first (transformers: model.resize_token_embeddings)"
            raise _different(first, other, "vocab_size", sizes[0], sizes[1], way)
        ours, theirs = (_compared(model.values, whole) for model in (first, other))
        way = "choose models of one shape, or correct a config.json that is wrong"
        for key in sorted(ours.keys() & theirs.keys(), key=lambda key: (key.startswith("model."), key)):
            if ours[key] != theirs[key]:
                raise _different(first, other, key, ours[key], theirs[key], way)
        if whole and first.layers != other.layers:
            raise _different(first, other, "layers", first.layers, other.layers, "choose layers with slices")


def _different(one: Model, other: Model, key: str, ours: Any, theirs: Any, way: str) -> UserError:
    return UserError(f"{one.name} and {other.name} differ in {key} ({ours!r} and {theirs!r}); {way}")


def _compared(values: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """What a config.json says of what a model computes: its keys and, of a family that lcx knows, what they come to.

    Without what is about its layers, unless models are merged as a `whole`.
    """
    ignored = {*NO_EFFECT, *ROPE_KEYS, LENGTH, *(() if whole else (*LAYER_COUNTS, *PER_LAYER, "model.num_layers", "model.pattern"))}
    given = {key: value for key, value in _full(values).items() if value is not None and not changes_nothing(key)}
    try:
        model = hf_config.read(values).model
    except UserError:
        known = {}
    else:
        known = {f"model.{field.name}": getattr(model, field.name) for field in dataclasses.fields(model)}
    return {key: value for key, value in {**given, **known}.items() if key not in ignored}


def _full(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults of its family, if lcx knows it."""
    family = FAMILIES.get(str(values.get("model_type")))
    return {**(family.optional if family else {}), **values}


def rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json and its length, in one form for transformers 5 and older ones."""
    family = FAMILIES.get(str(values.get("model_type")))
    nested = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = nested.pop("rope_theta", None) or values.get("rope_theta")
    found = {"rope_theta": theta or (family.theta if family else 10000.0)}
    kind = nested.pop("rope_type", None) or nested.pop("type", None)
    nested.pop("type", None)
    if nested or kind not in (None, "default"):
        found["rope_scaling"] = {**({"rope_type": kind} if kind else {}), **nested}
    rest = ("rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings", LENGTH)
    return found | {key: values[key] for key in rest if values.get(key) is not None}


def rotary_text(values: Mapping[str, Any]) -> str:
    """`rotary` in one line."""
    return ", ".join(f"{key}={value}" for key, value in rotary(values).items())


def same_rotary(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two config.json turn queries and keys alike, up to the same length."""
    try:
        a, b = hf_config.read(one), hf_config.read(other)
    except UserError:  # an architecture that lcx merges without knowing it
        return rotary(one) == rotary(other)
    return (a.schemes, a.length) == (b.schemes, b.length)


def rotary_source(models: Sequence[Model], named: str | None) -> Model:
    """The model whose rotary settings the result gets; raises `UserError` where models differ and none is `named`."""
    if named is not None:
        for model in models:
            if model.name == named:
                return model
        raise UserError(f"rotary_source={named!r} is none of the merged models; name one of {', '.join(m.name for m in models)}")
    first = models[0]
    for other in models[1:]:
        if not same_rotary(first.values, other.values):
            raise UserError(
                f"{first.name} ({rotary_text(first.values)}) and {other.name} ({rotary_text(other.values)}) differ in their rotary "
                "settings, so their queries and keys do not fit together; "
                f"merge models of one setting, or say whose counts with rotary_source: {other.name}"
            )
    return first


def same_vocabulary(one: Path, other: Path) -> None:
    """Raises `UserError` for folders whose tokenizers have other tokens, or the same under other ids; one without any fits all."""
    a, b = vocabulary(one), vocabulary(other)
    if a is None or b is None or a == b:
        return
    token = min((key for key in a.keys() | b.keys() if a.get(key) != b.get(key)), key=lambda key: (a.get(key, b.get(key)), key))
    ours, theirs = (f"{token!r} is {found[token]}" if token in found else f"{token!r} is missing" for found in (a, b))
    raise UserError(
        f"the vocabularies of {one} and {other} differ ({ours} in one, {theirs} in the other), so their embeddings do not fit "
        "together; merge models of one vocabulary, or give them one first (transformers: tokenizer.add_tokens, "
        "model.resize_token_embeddings)"
    )


def vocabulary(folder: Path) -> dict[str, int | str] | None:
    """Token -> id of a folder's tokenizer; for one that is no tokenizer.json, file -> digest; None without a tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        files = tokenizer_files(folder)
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} or None
    values = hf_config.read_json(path)
    try:
        model, added = values["model"], values.get("added_tokens") or []
        listed = model["vocab"]
        found = dict(listed) if isinstance(listed, dict) else {row[0]: i for i, row in enumerate(listed)}
        return found | {token["content"]: token["id"] for token in added}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a tokenizer.json: it has no vocabulary ({error}); download it again") from error


def config_text(values: Mapping[str, Any]) -> str:
    """A config.json's content."""
    return json.dumps(values, indent=2) + "\n"


def with_rotary(values: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the rotary settings and the length of another."""
    keys = (*ROPE_KEYS, LENGTH)
    kept = {key: value for key, value in values.items() if key not in keys}
    kept |= {key: other[key] for key in keys if key in other}
    return kept | hf_config.longer(kept, values.get(LENGTH), kept.get(LENGTH, 0))
