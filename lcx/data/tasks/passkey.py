"""One needle in text, whose key is always the same."""

from __future__ import annotations

import numpy as np

from lcx.data.tasks.base import LETTERS, Draw, RetrievalTask


class Passkey(RetrievalTask):
    """One needle and its query."""

    def counts(self, length: int, needles: int | None = None, queries: int | None = None) -> tuple[int, int]:
        """One needle and one query, whatever the settings."""
        return 1, 1

    def _distinct(self, draw: Draw, names: int) -> np.ndarray:
        return np.full_like(super()._distinct(draw, names), len(LETTERS) ** self.config.key_length // 2)
