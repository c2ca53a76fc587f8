"""The lcx side of the benchmark of evaluation: the backend of `lcx eval`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from ask_side import Ask, serve

from lcx.evals.base import Item
from lcx.recipes import models
from lcx.recipes.recipe import backend_of


def build(case: dict[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """`length` and `share_prefixes` of the case are the backend's."""
    backend = backend_of(models.load(case["model"]), case["length"], share_prefixes=case["share_prefixes"])

    def ask(prompts: Sequence[np.ndarray], new_tokens: int) -> list[str]:
        items = [Item(row, row[:1]) for row in prompts]
        found = {number: text for some in backend.complete(items, new_tokens) for number, text in some.items()}
        return [found[number] for number in range(len(prompts))]

    return ask, {"versions": {name: version(name) for name in ("jax", "jaxlib")}}


if __name__ == "__main__":
    serve(build)
