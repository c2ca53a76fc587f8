"""Small arithmetic on sizes."""

from __future__ import annotations


def round_up(x: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `x`."""
    return -(-x // multiple) * multiple
