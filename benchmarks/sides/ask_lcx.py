"""The lcx side of the benchmark of evaluation: the backend of `lcx eval`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from ask_side import Ask, serve

from lcx.data.tokenizers import tokenizers
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Item
from lcx.model.architecture import build_schemes
from lcx.recipes import models


def build(case: dict[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """`length` and `share_prefixes` of the case are the backend's."""
    loaded = models.load(case["model"])
    run = loaded.run
    backend = LocalBackend(
        loaded.params, run.model, run.execution, build_schemes(run.model, loaded.schemes), case["length"],
        tokenizer=tokenizers.load(run.data.tokenizer), stop_ids=loaded.stop_ids, share_prefixes=case["share_prefixes"],
    )  # fmt: skip

    def ask(prompts: Sequence[np.ndarray], new_tokens: int) -> list[str]:
        items = [Item(row, row[:1]) for row in prompts]
        found = {number: text for some in backend.complete(items, new_tokens) for number, text in some.items()}
        return [found[number] for number in range(len(prompts))]

    return ask, {"versions": {name: version(name) for name in ("jax", "jaxlib")}}


if __name__ == "__main__":
    serve(build)
