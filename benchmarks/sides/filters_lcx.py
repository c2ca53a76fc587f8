"""lcx's side of the benchmark of filters."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from filters_side import serve

from lcx.core.version import VERSION
from lcx.data.curation.document import Document
from lcx.data.curation.filters import verdict
from lcx.data.curation.settings import FilterSettings


@functools.cache
def _settings(names: tuple[str, ...]) -> FilterSettings:
    return dataclasses.replace(FilterSettings(), filters=names)


def judge(text: str, names: tuple[str, ...]) -> str | None:
    found = verdict(_settings(names), Document("", text.encode()))
    return None if found is None else ":".join(found)


if __name__ == "__main__":
    serve(judge, {"lcx": VERSION, "numpy": np.__version__})
