"""Context-length scaling of language models: extend, watch, evaluate. The names of `lcx.api`, imported when they are first used."""

from __future__ import annotations

from typing import Any

from lcx.core.errors import UserError
from lcx.core.version import VERSION

__version__ = VERSION
__all__ = ["UserError", "evaluate", "export", "extend", "generate", "load", "plot", "scheme", "theta_report", "train"]


def __getattr__(name: str) -> Any:
    """A name of `lcx.api`; `import lcx` alone loads neither JAX nor anything else that is heavy."""
    if name not in __all__:
        raise AttributeError(f"module 'lcx' has no attribute {name!r}")
    from lcx import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
