"""Which of many cases run in `make test`; `make test-all` runs all of them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """The values as parameters, marked slow except for those in `quick`."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
