"""Results written into the README of an experiment, between marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def fill(readme: Path, name: str, text: str) -> None:
    """Put `text` between the marks `<!-- name -->` and `<!-- /name -->`; raises ValueError where they are missing."""
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, count = mark.subn(lambda found: f"{found[1]}{text}\n{found[2]}", readme.read_text())
    if count != 1:
        raise ValueError(f"{readme} holds the marks of {name!r} {count} times, not once")
    readme.write_text(filled)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are shown with `str`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
