"""Loss of held-out text apart for kinds of tokens and for sources: what a mean over all of them hides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

import numpy as np

from lcx.data.tokenizers.stream import pieces
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Backend, Materials, Task
from lcx.evals.results import Measurement
from lcx.evals.tasks.key_tokens import short_context
from lcx.evals.tasks.perplexity import Spans, mean_loss
from lcx.evals.text.token_kinds import COPIES, KINDS, copies, kinds


@dataclasses.dataclass(frozen=True)
class LossByKind(Task):
    """`nll` in nats per token of each of `lcx.evals.text.token_kinds.KINDS` and `COPIES` that the spans hold, at each length."""

    name = "loss_by_kind"
    same_text = True
    spans: Spans
    groups: Mapping[str, np.ndarray]
    """Which tokens are of a kind, boolean `[R, longest]`."""
    near: int | None = None
    """`evals.short_context`; the usual one follows from the longest length."""

    @classmethod
    def build(cls, materials: Materials) -> Self | None:
        """The spans that `perplexity` scores."""
        config = materials.config
        if not config.perplexity_tokens:
            return None
        spans = Spans.of(materials, materials.part(config.text, "text", is_task=False).source)
        near = short_context(config)
        kind = np.stack([kinds(pieces(materials.tokenizer, row)) for row in spans.text])[:, 1:]
        copy = np.stack([copies(row, spans.bytes_per_token, near) for row in spans.text])[:, 1:]
        found = {name: kind == i for i, name in enumerate(KINDS)} | {name: copy == i for i, name in enumerate(COPIES)}
        return cls(spans, {name: mask for name, mask in found.items() if mask.any()}, config.short_context)

    def count(self, zero_shot: bool) -> int:
        """All spans, under every scheme."""
        return len(self.spans.text)

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """A row for each kind."""
        losses, named = self.spans.losses(backend, length), self.spans.named(length)
        split = named if self.near is None else f"{named} near {self.near}"
        return [
            mean_loss(f"{self.name}_{kind}", "nll", length, losses, split if kind in ("copied_near", "copied_far") else named, mask)
            for kind, mask in self.groups.items()
        ]


@dataclasses.dataclass(frozen=True)
class LossBySource(Task):
    """`nll` in nats per token of each text part of the mixture, at each length."""

    name = "loss_by_source"
    same_text = True
    sources: Mapping[str, Spans]

    @classmethod
    def build(cls, materials: Materials) -> Self | None:
        """Spans of every text part; those of the first are what `perplexity` scores."""
        if not materials.config.perplexity_tokens:
            return None
        parts = {name: part for name, part in materials.data.parts.items() if not part.is_task} or materials.data.parts
        return cls({name: Spans.of(materials, part.source) for name, part in parts.items()})

    def count(self, zero_shot: bool) -> int:
        """All spans, under every scheme."""
        return max(len(spans.text) for spans in self.sources.values())

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """A row for each source."""
        return [
            mean_loss(f"{self.name}_{source}", "nll", length, spans.losses(backend, length), spans.named(length))
            for source, spans in self.sources.items()
        ]
