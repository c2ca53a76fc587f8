"""Any positional scheme on a checkpoint that was trained under another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.model.config import ModelConfig, is_local
from lcx.positions.registry import ALIASES, SCHEMES, extend
from lcx.positions.scheme import Scheme
from lcx.positions.theta import critical_base


def at_length(schemes: Mapping[str, Scheme], spec: str, trained: int, length: int) -> dict[str, Scheme]:
    """The schemes (by layer kind) of a checkpoint trained at `trained` tokens, replaced by `spec` for `length` tokens.

    `spec` is "none" (as trained) or a scheme such as `yarn` or `linear:factor=16`; theta, layout and trained length stay the
    checkpoint's unless named. A factor that is not named is length / trained, 1 at least. `theta=critical` is the critical base
    for `length` (2310.05209). Layers under a sliding window keep their scheme: their distances do not grow.
    """
    if spec.strip() == "none":
        return dict(schemes)
    return {kind: scheme if is_local(kind) else _replace(scheme, spec, trained, length) for kind, scheme in schemes.items()}


def check(spec: str) -> str:
    """`spec`, when `at_length` can read its name; raises `UserError` with the nearest otherwise."""
    if spec.strip() != "none":
        choice("the positions to try zero-shot", _name(spec), SCHEMES)
    return spec


def refuse_learned(spec: str, schemes: Mapping[str, Scheme], config: ModelConfig, length: int) -> None:
    """Raises `UserError` for a scheme with parameters of its own, which a checkpoint of another scheme doesn't have."""
    for kind, scheme in schemes.items():
        if not is_local(kind) and (learned := scheme.param_specs(config.heads, length)):
            raise UserError(
                f"positions={spec!r} learns {', '.join(learned)}, which the checkpoint does not have; "
                "try a scheme without parameters, such as yarn, or train with this one"
            )


def _name(spec: str) -> str:
    name = spec.partition(":")[0].strip()
    return ALIASES.get(name, name)


def _replace(scheme: Scheme, spec: str, trained: int, length: int) -> Scheme:
    fields = {field.name for field in dataclasses.fields(SCHEMES[choice("positions", _name(spec), SCHEMES)])}
    settings = [item for item in spec.partition(":")[2].split(",") if item.strip()]
    given = {item.partition("=")[0].strip(): item.partition("=")[2].strip() for item in settings}
    if given.get("theta") == "critical":
        theta = getattr(scheme, "theta", None)
        if theta is None:
            raise UserError(
                f"positions={spec!r}: a {scheme.name} checkpoint has no theta to start from; name one, as in theta=10000"
            )
        settings.remove(next(item for item in settings if item.partition("=")[0].strip() == "theta"))
        settings.append(f"theta={critical_base(theta, trained, length) if length > trained else theta!r}")
    if "factor" in fields and "factor" not in given:
        settings.append(f"factor={max(1.0, length / trained)!r}")
    return extend(scheme, f"{_name(spec)}:{','.join(settings)}", trained)
