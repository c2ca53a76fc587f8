"""Hugging Face's rotary settings, read from and written for a model's config.

Reads both transformers 5's `rope_parameters` and the older `rope_scaling` with `rope_theta`, flat or nested by layer type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.positions.absolute import Nope
from lcx.positions.query_scaling import QueryScaling
from lcx.positions.rotary import Linear, Rope
from lcx.positions.scaling import Dynamic, Llama3, LongRope, Proportional, Yarn
from lcx.positions.scheme import Layout, Scheme

ROPE_TYPES: dict[str, type[Rope]] = {
    "default": Rope,
    "linear": Linear,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "su": LongRope,
    "llama3": Llama3,
    "proportional": Proportional,
}
"""Hugging Face's `rope_type` -> scheme; `su` is the old name of `longrope`."""

_DEFAULT_THETA = 10000.0


def from_hf(config: Mapping[str, Any], layout: Layout = "half") -> Scheme | dict[str, Scheme]:
    """The scheme of a model's config (the dict of its config.json), or one for each layer type if they differ.

    `layout` is a property of the family that Hugging Face's configs do not state. A layer type whose entry is null has no rotary
    embedding. Raises `UserError` for rope types that lcx does not have and for missing keys.
    """
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    for key, found in (("rope_parameters", newer), ("rope_scaling", older)):
        if found is not None and not isinstance(found, Mapping):
            raise UserError(f"{key}={found!r} of the Hugging Face config is not a mapping")
    if newer and older:
        # Other versions of transformers read one or the other.
        one, other = (from_hf({**config, "rope_parameters": found, "rope_scaling": None}, layout) for found in (newer, older))
        if one != other:
            raise UserError(
                f"rope_parameters={newer!r} and rope_scaling={older!r} of the Hugging Face config disagree; keep only one"
            )
    parameters = newer or older or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    if nested:
        entries = {key: value for key, value in parameters.items() if value is None or isinstance(value, Mapping)}
        return {key: Nope() if value is None else from_parameters(value, config, layout) for key, value in entries.items()}
    scheme = from_parameters(parameters, config, layout)
    local = config.get("rope_local_base_freq")
    if local is None:
        return scheme
    # Gemma 3 before transformers 5: scaling and rope_theta apply to the global layers only.
    return {"full_attention": scheme, "sliding_attention": from_parameters({"rope_theta": local}, config, layout)}


def from_parameters(parameters: Mapping[str, Any], config: Mapping[str, Any], layout: Layout = "half") -> Rope:
    """The scheme of one flat `rope_parameters` or `rope_scaling` dict; `config` is the model's, for the settings outside it."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES or parameters.get("mrope_section"):
        shown = "mrope" if parameters.get("mrope_section") else kind
        raise UserError(f"rope_type={shown!r} of the Hugging Face config is unknown{nearest(shown, ROPE_TYPES)}")
    trained = _trained_length(kind, parameters, config)
    values = dict(parameters)
    if kind in ("yarn", "longrope", "su") and values.get("factor") is None and trained and config.get("max_position_embeddings"):
        values["factor"] = max(1.0, config["max_position_embeddings"] / trained)
    common: dict[str, Any] = {
        "theta": _number(
            "rope_theta",
            _first(parameters.get("rope_theta"), config.get("rope_theta"), config.get("default_theta"), _DEFAULT_THETA),
        ),
        "partial": float(_first(parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0)),
        "original_length": trained,
        "layout": layout,
    }
    if parameters.get("llama_4_scaling_beta"):
        common["temperature"] = QueryScaling("ministral", float(parameters["llama_4_scaling_beta"]), trained)
    try:
        return ROPE_TYPES[kind].from_hf(values, **common)
    except KeyError as error:
        raise UserError(f"rope_type={kind!r} of the Hugging Face config needs the key {error.args[0]!r}") from error


def to_hf(scheme: Scheme | Mapping[str, Scheme]) -> dict[str, Any]:
    """`rope_parameters` of a scheme, or of one for each layer type; raises `UserError` if Hugging Face has no such setting."""
    if isinstance(scheme, Mapping):
        return {key: None if isinstance(value, Nope) else value.to_hf() for key, value in scheme.items()}
    return scheme.to_hf()


def _trained_length(kind: str, parameters: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The trained length that transformers uses; for rotary without scaling, the length that the config declares."""
    own, declared = parameters.get("original_max_position_embeddings"), config.get("max_position_embeddings")
    match kind:
        case "llama3" | "yarn" | "longrope" | "su":
            length = _first(config.get("original_max_position_embeddings"), own, declared)
        case "dynamic" | "default":
            length = _first(own if kind == "default" else None, declared, own)
        case _:
            length = own
    return None if length is None else int(length)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}={value!r} of the Hugging Face config is not a number")
    return float(value)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
