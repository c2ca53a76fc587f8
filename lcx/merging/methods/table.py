"""The ways to merge by the names that mergekit's YAML has for them."""

from __future__ import annotations

from lcx.merging.methods.method import Method
from lcx.merging.methods.pairs import PAIRS
from lcx.merging.methods.span import SPAN
from lcx.merging.methods.sparse import SPARSE

METHODS: dict[str, Method] = {**SPAN, **SPARSE, **PAIRS}
