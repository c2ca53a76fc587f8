"""How likely documents are under a model, per byte, and how much likelier than under another. Legend: D documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.data.tokenizers.stream import pieces
from lcx.recipes.reader import ModelScore


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """A text is read up to `window` tokens."""

    window: int = 1024

    def __post_init__(self) -> None:
        positive("settings", window=self.window)
        if self.window < 2:
            raise UserError(f"settings.window={self.window} leaves no token to predict; make it at least 2")


class LossPerByte(ModelScore):
    """Mean loss in nats per byte of UTF-8, which models of any tokenizer can be compared by; a text of one token has none."""

    kind, settings_class = "loss_per_byte", LossSettings
    settings: LossSettings

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The losses; the first token is neither predicted nor counted."""
        rows = self.reader.read(texts, self.settings.window)
        kept = [i for i, row in enumerate(rows) if len(row) > 1]
        found = np.full(len(texts), np.nan, np.float32)
        for i, nll in zip(kept, self.reader.losses([rows[i] for i in kept], self.settings.window), strict=True):
            size = len("".join(pieces(self.reader.tokenizer, rows[i])[1:]).encode("utf-8", "surrogatepass"))
            if size:
                found[i] = np.sum(nll, dtype=np.float64) / size
        return found


@dataclasses.dataclass(frozen=True)
class LikelihoodRatio:
    """How much likelier a text is under one model than under another: what the first was trained on stands out."""

    model: LossPerByte
    other: LossPerByte

    @property
    def fingerprint(self) -> str:
        """Changes with the settings and both models."""
        return f"{self.model.fingerprint} {self.other.fingerprint}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Mean log-likelihood in nats per byte under `model` minus that under `other`, float32 `[D]`, of what both windows hold."""
        cut = [text[: min(_held(one, text) for one in (self.model, self.other))] for text in texts]
        return self.other(cut) - self.model(cut)


def _held(loss: LossPerByte, text: str) -> int:
    """Characters of a text that a window holds."""
    tokens = loss.reader.tokenizer.encode(text)
    if len(tokens) <= loss.settings.window:
        return len(text)
    return len("".join(pieces(loss.reader.tokenizer, tokens[: loss.settings.window])))
