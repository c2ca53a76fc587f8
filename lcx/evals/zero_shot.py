"""Any positional scheme on a checkpoint that was trained under another one."""

from __future__ import annotations

from collections.abc import Mapping

from lcx.core.errors import UserError
from lcx.model.config import ModelConfig, is_local
from lcx.positions.derive import extend_to
from lcx.positions.registry import scheme_class, settings
from lcx.positions.scheme import Scheme


def at_length(schemes: Mapping[str, Scheme], spec: str, trained: int, length: int) -> dict[str, Scheme]:
    """The schemes (by layer kind) of a checkpoint trained at `trained` tokens, replaced by `spec` for `length` tokens.

    `spec` is "none" (as trained) or a scheme such as `yarn` or `linear:factor=16`; theta and layout stay the
    checkpoint's unless named, and so does a trained length that its frequencies depend on. A factor that is not named is
    length / trained, 1 at least. `theta=critical` is the critical base for `length` (2310.05209). Layers under a sliding window
    keep their scheme: their distances do not grow.
    """
    if spec.strip() == "none":
        return dict(schemes)
    return {kind: scheme if is_local(kind) else extend_to(scheme, spec, trained, length) for kind, scheme in schemes.items()}


def check(spec: str, path: str = "positions") -> str:
    """`spec`, when `at_length` can read its name; raises `UserError` with `path` and the nearest otherwise."""
    if spec.strip() != "none":
        scheme_class(settings(spec, path)["name"], path)
    return spec


def refuse_learned(spec: str, schemes: Mapping[str, Scheme], config: ModelConfig, length: int) -> None:
    """Raises `UserError` for a scheme with parameters of its own, which a checkpoint of another scheme doesn't have."""
    for kind, scheme in schemes.items():
        if not is_local(kind) and (learned := scheme.param_specs(config.heads, length)):
            raise UserError(
                f"positions={spec!r} learns {', '.join(learned)}, which the checkpoint does not have; "
                "try a scheme without parameters, such as yarn, or train with this one"
            )
