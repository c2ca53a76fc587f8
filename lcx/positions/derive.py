"""A scheme made from another: with another theta, another scaling, for another length, or in the form that Hugging Face has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.core.errors import UserError
from lcx.positions.piecewise import Piecewise
from lcx.positions.registry import ROTARY, from_config, scheme_class, settings
from lcx.positions.rotary import Ntk, Rope, Stretched
from lcx.positions.scaling import Dynamic, Proportional
from lcx.positions.scheme import Scheme
from lcx.positions.theta import critical_base, ntk_base


def with_theta(scheme: Scheme, theta: float) -> Scheme:
    """The scheme with another theta; raises `UserError` if it has none."""
    inner = getattr(scheme, "scaling", None)
    if inner is not None:
        return dataclasses.replace(scheme, theta=theta, scaling=with_theta(inner, theta))
    if not hasattr(scheme, "theta"):
        raise UserError(f"positional scheme {scheme.name!r} has no theta, which should be {theta}; use a rotary scheme")
    return dataclasses.replace(scheme, theta=theta)


def extend(scheme: Scheme, spec: str | Mapping[str, Any], trained_length: int | None = None) -> Scheme:
    """The scheme of `spec`, keeping what `scheme` says about the trained model unless `spec` overrides it.

    Theta, layout, partial, trained length and temperature are kept if the new scheme has them: a zero-shot comparison on one
    checkpoint must not change them. `trained_length` is what the weights have been trained at since `scheme` was set: it takes
    the place of a shorter `original_length`, or of none, unless the frequencies of `scheme` depend on that.
    Raises `UserError` where a `partial` would be kept that means something else in the new scheme.
    """
    values = settings(spec) if isinstance(spec, str) else dict(spec.items())
    fields = _fields(scheme_class(values.get("name")))
    kept = {key: value for key, value in _kept(scheme, trained_length).items() if key in fields - set(values) and value is not None}
    new = from_config({**values, **kept})
    if kept.get("partial", 1) != 1 and _is_proportional(scheme) != _is_proportional(new):
        raise UserError(
            f"partial={kept['partial']} of {scheme.name!r} and of {new.name!r} turn different dims, as p-RoPE counts pairs of the "
            f"whole head; name one, as in '{new.name}:partial=1'"
        )
    return new


def extend_to(scheme: Scheme, spec: str, trained: int, length: int) -> Scheme:
    """As `extend`, for `length` tokens of a model trained at `trained`.

    A factor that is not named is length / trained, 1 at least. `theta=critical` is the critical base for `length` (2310.05209).
    """
    values = settings(spec)
    if values.get("theta") == "critical":
        if (theta := getattr(scheme, "theta", None)) is None:
            raise UserError(
                f"positions={spec!r}: a {scheme.name} checkpoint has no theta to start from; name one, as in theta=10000"
            )
        values["theta"] = critical_base(theta, trained, length) if length > trained else theta
    if "factor" in _fields(scheme_class(values["name"])):
        values.setdefault("factor", max(1.0, length / trained))
    return extend(scheme, values, trained)


def resolved(scheme: Scheme, head_dim: int, length: int) -> Scheme:
    """The scheme with the values that depend on the declared length filled in, in a form that Hugging Face has."""
    if isinstance(scheme, Ntk):
        theta = ntk_base(scheme.theta, scheme.stretch(length), int(head_dim * scheme.partial))
        kept = ("partial", "layout", "original_length", "temperature")
        return Rope(theta=theta, **{name: getattr(scheme, name) for name in kept})
    if isinstance(scheme, Stretched) and scheme.factor is None:
        # Dynamic NTK grows with the length, whatever its factor.
        return dataclasses.replace(scheme, factor=1.0 if isinstance(scheme, Dynamic) else scheme.stretch(length))
    return scheme


def _kept(scheme: Scheme, trained_length: int | None) -> dict[str, Any]:
    """What `scheme` says of the model, and None for what it doesn't say."""
    kept = {key: getattr(scheme, key, None) for key in (*ROTARY, "temperature")}
    length, temperature = kept["original_length"], kept["temperature"]
    depends = length is not None and isinstance(scheme, Stretched | Piecewise)
    if not depends and trained_length is not None:
        kept["original_length"] = max(length or 0, trained_length)
        if length is not None and length < trained_length and temperature is not None and temperature.kind != "llama4":
            # A temperature without a length of its own was trained with the scheme's.
            kept["temperature"] = dataclasses.replace(temperature, length=temperature.length or length)
    return kept


def _is_proportional(scheme: Scheme) -> bool:
    return isinstance(scheme, Proportional) or isinstance(getattr(scheme, "scaling", None), Proportional)


def _fields(cls: type[Scheme]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
