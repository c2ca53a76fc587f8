"""Optional libraries, imported only when something needs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from lcx.core.errors import UserError


def library(name: str, what: str, extra: str = "hf") -> ModuleType:
    """A library from an extra of the package; raises `UserError` saying that `what` needs it if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name, what, extra) from error


def check_installed(name: str, what: str, extra: str) -> None:
    """As `library`, without importing it."""
    if importlib.util.find_spec(name) is None:
        raise _missing(name, what, extra)


def _missing(name: str, what: str, extra: str) -> UserError:
    return UserError(f"{what} needs the {name} library; install the extra: pip install -e '.[{extra}]'")
