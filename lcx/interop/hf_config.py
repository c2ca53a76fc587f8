"""Conversion between the config.json of a Hugging Face model and lcx's configs.

Keys are of three kinds: those that lcx computes, those that change nothing, which are named, and all others, at which reading
fails. What was written is read back and compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.core.manifest import check_file
from lcx.interop.families import FAMILIES, LENGTHS, NEUTRAL, NO_EFFECT, REQUIRED, ROPE_KEYS, Family, changes_nothing
from lcx.model.config import ModelConfig, is_local
from lcx.positions import hf
from lcx.positions.absolute import Nope
from lcx.positions.derive import resolved
from lcx.positions.rotary import Rope
from lcx.positions.scaling import Dynamic, LongRope
from lcx.positions.scheme import Scheme

FILE = "config.json"

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}
"""Name of an activation in transformers -> `ModelConfig.activation`."""

FIELDS = {
    "vocab_size": "vocab_size",
    "model_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "mlp_bias": "mlp_bias",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "normalize_expert_weights": "norm_topk_prob",
}
"""Fields of `ModelConfig` whose value is stored unchanged under one key of config.json."""


LENGTH = "max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config.json says: the family's name, the model, the scheme of each layer kind, the length it was trained for."""

    model_type: str
    model: ModelConfig
    schemes: dict[str, Scheme]
    length: int
    ignored: tuple[str, ...] = ()
    """Keys that change nothing and are not among the usual ones."""

    @property
    def family(self) -> Family:
        """The family's row of the table."""
        return FAMILIES[self.model_type]


def read_file(folder: Path) -> Described:
    """The model described by a folder's config.json; raises `UserError` if lcx cannot compute exactly that."""
    return read(values_of(folder), str(folder / FILE))


def values_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder."""
    path = folder / FILE
    if not path.exists():
        found = sorted(folder.glob("*.gguf"))
        hint = f"; name the file itself to read its {found[0].name}" if found else ""
        raise UserError(f"{folder} has no {FILE}, so it is not a Hugging Face model; name one{hint}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `UserError` if it is anything else, or not as a manifest beside it says."""
    check_file(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch or write it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def read(values: Mapping[str, Any], where: str = FILE) -> Described:
    """The model described by a config.json, given as a mapping; errors start with `where`."""
    model_type = values.get("model_type")
    if model_type is None and "stages" in values:
        raise UserError(
            f"{where} is the config of a run of lcx, not of a Hugging Face model; `lcx export` writes the run's model as one"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = nearest(str(model_type), FAMILIES)
        raise UserError(f"{where}: model_type={model_type!r} is not an architecture that lcx supports{hint}")
    family = FAMILIES[model_type]
    architectures = values.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(f"{where}: architectures={architectures!r} is not supported; expected {[family.architecture]!r}")
    ignored = _check_keys(values, family, where)
    full = {**family.optional, **{ours: values[theirs] for theirs, ours in family.aliases.items() if theirs in values}, **values}
    for key in (*REQUIRED, *family.optional):
        _check_type(key, full.get(key), family, where)
    try:
        model = _model(full, family, where)
        by_type = hf.from_hf({"default_theta": family.theta, **_rope_keys(full, family)})
    except UserError as error:
        raise error if where in str(error) else UserError(f"{where}: {error}") from error
    schemes: dict[str, Scheme] = {}
    for kind in model.kinds:
        if kind.endswith("nope"):
            schemes[kind] = Nope()
        elif isinstance(by_type, Mapping):
            schemes[kind] = by_type["sliding_attention" if is_local(kind) else "full_attention"]
        else:
            schemes[kind] = by_type
        if not family.scales_queries and getattr(schemes[kind], "temperature", None) is not None:
            schemes[kind] = dataclasses.replace(schemes[kind], temperature=None)
    if family.scales_queries and all(getattr(scheme, "temperature", None) is None for scheme in schemes.values()):
        raise UserError(
            f"{where}: rope_parameters has no llama_4_scaling_beta, which {family.architecture} needs; fetch the whole file"
        )
    return Described(model_type, model, schemes, int(full["max_position_embeddings"]), ignored)


def write(
    model: ModelConfig,
    schemes: Mapping[str, Scheme],
    length: int,
    dtype: str,
    base: Mapping[str, Any] | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> dict[str, Any]:
    """config.json of a model with the scheme of each of its layer kinds, for rows of up to `length` tokens.

    `base` is the config.json that the model came with: keys that lcx does not set are kept. Without it, `bos_id` and
    `eos_id` are the tokenizer's. Rotary settings are written both as `rope_parameters` and under the older keys. `dtype` is numpy's
    name of the weights' type. Raises `UserError` if no family has all of the model's options, or if Hugging Face has no equivalent
    of its positions.
    """
    schemes = {kind: resolved(schemes[kind], model.head_dim, length) for kind in model.kinds}
    wanted = Described("", model, dict(schemes), length)
    # If these are missing, transformers uses the ids of the family's own tokenizer, and ends texts at one of them.
    base = base or {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": None}
    reasons: dict[str, str] = {}
    own = [str(base["model_type"])] if "model_type" in base else list(FAMILIES)
    scaling = [other for other in (FAMILIES[name].with_scaled_queries for name in own) if other not in (None, *own)]
    for model_type in (*own, *scaling):
        try:
            values = _values(model_type, wanted, dtype, base)
            reason = _difference(wanted, read(values))
        except UserError as error:
            reason = str(error)
        if reason is None:
            return values
        reasons[model_type] = reason
    why = set(reasons.values())
    each = why.pop() if len(why) == 1 else "; ".join(f"{model_type}: {reason}" for model_type, reason in reasons.items())
    raise UserError(f"none of the Hugging Face families that lcx writes can represent this model ({each})")


def _check_keys(values: Mapping[str, Any], family: Family, where: str) -> tuple[str, ...]:
    """The keys that are ignored; raises `UserError` for those that would change what the model computes, or might."""
    ignored = []
    known = {*REQUIRED, *ROPE_KEYS, *family.optional, *family.aliases, *NO_EFFECT, *NEUTRAL}
    for key, value in values.items():
        if key in NEUTRAL and key not in family.optional and value not in NEUTRAL[key]:
            raise UserError(f"{where}: {key}={value!r} is not supported; expected {' or '.join(map(repr, NEUTRAL[key]))}")
        if key == "quantization_config" and value is not None:
            raise UserError(f"{where}: {key}={value!r} is not supported; use the original checkpoint before quantisation")
        if key not in known and value is not None:
            if not changes_nothing(key):
                raise UserError(
                    f"{where}: {key}={value!r} is not supported for {values['model_type']}; "
                    "if it does not change what the model computes, remove it from the file"
                )
            ignored.append(key)
    for key in REQUIRED:
        if values.get(key) is None:
            raise UserError(f"{where}: {key} is missing, without which the model is not known; fetch the whole file")
    return tuple(ignored)


_TYPES: dict[str, tuple[type, ...]] = {
    "rms_norm_eps": (float, int), "hidden_act": (str,), "hidden_activation": (str,), "layer_types": (list,),
    "no_rope_layers": (list,), "query_pre_attn_scalar": (int, float), "attn_logit_softcapping": (float, int),
    "final_logit_softcapping": (float, int), "tie_word_embeddings": (bool,), "attention_bias": (bool,), "mlp_bias": (bool,),
    "use_sliding_window": (bool,), "norm_topk_prob": (bool,),
}  # fmt: skip
"""Types of the keys that are not integers."""


def _check_type(key: str, value: Any, family: Family, where: str) -> None:
    allowed = _TYPES.get(key, (int,))
    if value is None and key not in REQUIRED:
        return
    if not isinstance(value, allowed) or isinstance(value, bool) and bool not in allowed:
        raise UserError(f"{where}: {key}={value!r}: expected {allowed[0].__name__}")
    if allowed == (int,) and value < 1 and key not in ("max_window_layers",):
        raise UserError(f"{where}: {key}={value} must be at least 1")
    if float in allowed and not 0 < value < math.inf:
        raise UserError(f"{where}: {key}={value} must be a number above 0")
    if allowed == (int,) and value > 2**31 - 1:
        raise UserError(f"{where}: {key}={value:,} does not fit into an int32; use at most {2**31 - 1:,}")
    if isinstance(value, list) and family.optional.get(key) is None and not value:
        raise UserError(f"{where}: {key} must not be empty")


def _model(full: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    fields = {name: full[key] for name, key in {**FIELDS, **family.fields}.items() if full.get(key) is not None}
    N, D = full["num_attention_heads"], full["hidden_size"]
    fields.setdefault("num_kv_heads", N)
    fields.setdefault("head_dim", D // N)
    act = "hidden_activation" if "hidden_activation" in family.optional else "hidden_act"
    if full[act] not in ACTIVATIONS:
        raise UserError(f"{where}: {act}={full[act]!r} is not a supported activation{nearest(str(full[act]), ACTIVATIONS)}")
    fields["activation"] = ACTIVATIONS[full[act]]
    if full.get("attention_bias"):
        fields |= {"qkv_bias": True, "out_bias": True}
    if full.get("query_pre_attn_scalar") is not None:
        fields["query_scale"] = full["query_pre_attn_scalar"] ** -0.5
    kinds = family.kinds(full)
    if len(kinds) != full["num_hidden_layers"]:
        raise UserError(f"{where}: layer_types lists {len(kinds)} layers, but num_hidden_layers={full['num_hidden_layers']}")
    if full.get("layer_types") and (other := set(full["layer_types"]) - {"full_attention", "sliding_attention"}):
        raise UserError(f"{where}: layer_types has {sorted(other)[0]!r}; lcx supports full_attention and sliding_attention")
    if any(is_local(kind) for kind in kinds):
        fields["window"] = full["sliding_window"]
    return ModelConfig(**fields, **family.options, pattern=_period(kinds))


def _period(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that yields these kinds when repeated."""
    lengths = range(1, len(kinds) + 1)
    return tuple(next(kinds[:n] for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds))))


def _rope_keys(full: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The keys that `positions.hf` reads, including those that a family with two rotary embeddings implies."""
    values = dict(full)
    if family.nested and not _nested(values.get("rope_parameters")):
        values.setdefault("rope_local_base_freq", 10000.0)
        values["default_theta"] = 1e6
    return values


def _nested(parameters: Any) -> bool:
    return isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values())


def _values(model_type: str, wanted: Described, dtype: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in a family's form; what the family cannot express is left out, and detected by reading it back."""
    model, family = wanted.model, FAMILIES[model_type]
    said = {key: getattr(model, name) for name, key in {**FIELDS, **family.fields}.items()}
    # A size that no layer uses: that of dense layers, if all have experts.
    said.setdefault("intermediate_size", base.get("intermediate_size", model.mlp_dim))
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    local = [is_local(kind) for kind in model.layer_kinds]
    first = local.index(True) if any(local) else model.num_layers
    scale = model.head_dim**-0.5 if model.query_scale is None else model.query_scale
    said |= {
        "hidden_act": names[model.activation],
        "hidden_activation": names[model.activation],
        "attention_bias": model.out_bias,
        "query_pre_attn_scalar": _whole(scale**-2),
        "sliding_window": model.window if any(local) else None,
        "use_sliding_window": any(local),
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in local],
        "no_rope_layers": [int(not isinstance(wanted.schemes[kind], Nope)) for kind in model.layer_kinds],
    }
    other = ("dtype", "torch_dtype", *(("architectures", "model_type") if base.get("model_type") != model_type else ()))
    kept = {key: value for key, value in base.items() if key not in ROPE_KEYS and key not in other}
    known = {key: said[key] for key in (*REQUIRED, *family.optional) if key in said}
    rope = _rope(wanted, family)
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **kept,
        **longer(kept, base.get(LENGTH), rope[LENGTH]),
        **known,
        **{theirs: known[ours] for theirs, ours in family.aliases.items()},
        **rope,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def longer(values: Mapping[str, Any], before: Any, length: int) -> dict[str, Any]:
    """The other keys that say a length, raised to `length` where they are below it and it exceeds the length `before`.

    vLLM takes the lowest of all.
    """
    if not isinstance(before, int) or length <= before:
        return {}
    return {key: length for key in LENGTHS if isinstance(value := values.get(key), int | float) and value < length}


def _rope(wanted: Described, family: Family) -> dict[str, Any]:
    """The rotary keys of a config.json in both forms, and the length."""
    by_type: dict[str, Scheme] = {}
    for kind in wanted.model.kinds:
        scheme = wanted.schemes[kind]
        key = "sliding_attention" if is_local(kind) else "full_attention"
        if not isinstance(scheme, Nope) and by_type.setdefault(key, scheme) != scheme:
            raise UserError(f"layers of one type have different positions ({key}), which Hugging Face cannot represent")
    full = by_type.get("full_attention") or next(iter(by_type.values()), Rope())
    local = by_type.get("sliding_attention", full)
    # Before comparing: a scheme without such a form makes the better error message.
    flat, local_flat = full.to_hf(), local.to_hf()
    if not family.nested and local != full:
        raise UserError(f"sliding and full layers have different positions, which {family.architecture} cannot represent")
    # Hugging Face's dynamic NTK extends from this length; otherwise it is the longest length of the model.
    length = full.original_length if isinstance(full, Dynamic) else wanted.length
    values: dict[str, Any] = {"max_position_embeddings": length, "rope_theta": flat["rope_theta"]}
    if isinstance(full, LongRope):
        values["original_max_position_embeddings"] = full.original_length
    if "partial_rotary_factor" in flat:
        values["partial_rotary_factor"] = flat["partial_rotary_factor"]
    if family.scales_queries and full.temperature is not None:
        # vLLM looks for it here.
        length_key = "original_max_position_embeddings"
        values["llama_4_scaling"] = {"beta": flat["llama_4_scaling_beta"], length_key: flat[length_key]}
    older = {key: value for key, value in flat.items() if key != "rope_theta"}
    if family.nested:
        values["rope_local_base_freq"] = local_flat["rope_theta"]
        values["rope_parameters"] = {"full_attention": flat, "sliding_attention": local_flat}
    else:
        values["rope_parameters"] = flat
    values["rope_scaling"] = None if older == {"rope_type": "default"} else {**older, "type": older["rope_type"]}
    return values


def _difference(wanted: Described, found: Described) -> str | None:
    """The first difference in what a model read back would compute; None if there is none."""
    for field in dataclasses.fields(ModelConfig):
        # The weight of the balance matters in training alone, and config.json does not record it; the others are compared below.
        if field.name in ("router_aux_weight", "pattern", "query_scale"):
            continue
        have, want = getattr(found.model, field.name), getattr(wanted.model, field.name)
        if field.name == "window" and not any(map(is_local, wanted.model.kinds)):
            continue
        if have != want:
            return f"it has no model.{field.name}={want!r}"
    scales = [m.head_dim**-0.5 if m.query_scale is None else m.query_scale for m in (found.model, wanted.model)]
    if not math.isclose(*scales, rel_tol=1e-12):
        return f"it has no model.query_scale={wanted.model.query_scale!r}"
    for layer, (have, want) in enumerate(zip(found.model.layer_kinds, wanted.model.layer_kinds, strict=True)):
        if is_local(have) != is_local(want):
            return f"it has no sliding window in layer {layer} alone"
        if not _same(found.schemes[have], wanted.schemes[want], wanted.model, wanted.length):
            return f"it has no positions {wanted.schemes[want].name!r} in layer {layer}"
    return None


def _same(scheme: Scheme, other: Scheme, model: ModelConfig, length: int) -> bool:
    """Whether two schemes compute the same at this length."""
    if scheme.spec(length) != other.spec(length):
        return False
    one, two = (x.buffers(model.heads, length) for x in (scheme, other))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), one, two)
    return jax.tree.structure(one) == jax.tree.structure(two) and all(jax.tree.leaves(same))


def _whole(x: float) -> float | int:
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x
