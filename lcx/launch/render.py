"""Templates to files: every value is quoted for the shell or for YAML where it stands, and a missing one is an error."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """A file of `templates/` with its values.

    In templates `sh` quotes a value for a shell, `lines` a list of words, one a line, and `yaml` a value or list for YAML, of which
    JSON is a part.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lcx.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"sh": shlex.quote, "lines": _lines, "yaml": _yaml}
    return environment.get_template(template).render(**values)


def _lines(words: Sequence[str], indent: int = 4) -> str:
    """Words quoted for a shell, those that are flags on lines of their own."""
    text = ""
    for word in words:
        before = "" if not text else f" \\\n{' ' * indent}" if word.startswith("-") else " "
        text += before + shlex.quote(word)
    return text


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
