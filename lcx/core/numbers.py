"""Small arithmetic on sizes."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time as people say it: in seconds, in minutes, or in hours and minutes."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def step_time(seconds: float) -> str:
    """The time of a step: three digits, or whole seconds where these are more."""
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def size(count: float) -> str:
    """A number of bytes as people read it."""
    if count >= 1e8:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count and what is counted, as in `1 device` and `4,096 devices`; `plural` where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def round_up(x: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `x`."""
    return -(-x // multiple) * multiple
