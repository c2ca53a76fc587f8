"""The table of positional schemes, and how text and configs name them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import ml_collections

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.positions.absolute import Learned, Nope, Sinusoidal
from lcx.positions.bias import T5, Alibi, Fire, Kerple
from lcx.positions.piecewise import DualChunk, LeakyRerope, Rerope, SelfExtend
from lcx.positions.rotary import Linear, Ntk, Rope
from lcx.positions.scaling import Dynamic, Llama3, LongRope, NtkByParts, Proportional, Yarn
from lcx.positions.scheme import Scheme
from lcx.positions.xpos import Xpos

SCHEMES: dict[str, type[Scheme]] = {
    "rope": Rope,
    "linear": Linear,
    "ntk": Ntk,
    "dynamic": Dynamic,
    "ntk_by_parts": NtkByParts,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "proportional": Proportional,
    "xpos": Xpos,
    "self_extend": SelfExtend,
    "rerope": Rerope,
    "leaky_rerope": LeakyRerope,
    "dual_chunk": DualChunk,
    "alibi": Alibi,
    "t5": T5,
    "kerple": Kerple,
    "fire": Fire,
    "nope": Nope,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
}

ALIASES = {"pi": "linear", "none": "rope", "default": "rope", "p_rope": "proportional"}
"""Other names of schemes. `none` is plain rotary, which does nothing about the length."""


ROTARY = ("theta", "layout", "partial", "original_length")
"""Settings that say how a rotary model was trained."""


def from_config(values: Mapping[str, Any] | str, path: str = "positions") -> Scheme:
    """The scheme of a mapping with a `name` (its other keys are settings), or of a string such as `yarn:factor=16,theta=500`.

    A `temperature` or `scaling` may be just a name. Raises `UserError` for unknown names, keys, types and values.
    """
    if isinstance(values, Scheme):
        return values
    if isinstance(values, str):
        values = settings(values, path)
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path}={values!r} is not a scheme; use a mapping with a name, or a string like 'yarn:factor=16'")
    values = dict(values.items())
    if "name" not in values:
        raise UserError(f"{path} has no name; allowed: {', '.join(sorted(SCHEMES))}")
    cls = scheme_class(values.pop("name"), f"{path}.name")
    if isinstance(values.get("temperature"), str):
        values["temperature"] = {"kind": values["temperature"]}
    if values.get("scaling") is not None and not isinstance(values["scaling"], Scheme):
        values["scaling"] = _inner(values, f"{path}.scaling")
    return configs.build(cls, values, f"{path}.{cls.name}")


def scheme_class(name: Any, path: str = "positions.name") -> type[Scheme]:
    """The class with that name or alias; raises `UserError` with the nearest name for any other."""
    known: str = configs.choice(path, name, (*SCHEMES, *ALIASES))
    return SCHEMES[ALIASES.get(known, known)]


def _inner(outer: Mapping[str, Any], path: str) -> Scheme:
    """The scheme inside a piecewise one, with the outer one's rotary settings unless it has its own."""
    values = outer["scaling"]
    values = settings(values, path) if isinstance(values, str) else values
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        return from_config(values, path)  # which refuses it
    shared = {key: outer[key] for key in ROTARY if key in outer and key not in values}
    return from_config({**shared, **dict(values.items())}, path)


def settings(spec: str, path: str = "positions") -> dict[str, Any]:
    """The mapping of a string `name:key=value,key=value`; dots refer to nested settings (`temperature.kind=llama4`)."""
    name, _, rest = spec.partition(":")
    values: dict[str, Any] = {"name": name.strip()}
    for item in _split(rest):
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{path}={spec!r}: {item!r} is not key=value, as in 'yarn:factor=16,theta=500000'")
        *parents, last = key.strip().split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"{path}={spec!r}: {parent!r} is given both a value and settings; remove one")
        place[last] = _value(text.strip())
    return values


def to_config(scheme: Scheme) -> dict[str, Any]:
    """The scheme as a plain mapping that `from_config` reads back."""
    values = {"name": scheme.name, **configs.plain(scheme)}
    inner = getattr(scheme, "scaling", None)
    if inner is not None:
        values["scaling"] = to_config(inner)
    return values


def fingerprint(scheme: Scheme) -> str:
    """Sixteen hex digits that change with every setting."""
    return configs.fingerprint(to_config(scheme))


def _split(text: str) -> list[str]:
    """`text` split at its commas, except those inside brackets."""
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    return [item for item in items if item.strip()]


def _value(text: str) -> Any:
    """The Python literal that the text represents (numbers, lists, None, booleans), or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
