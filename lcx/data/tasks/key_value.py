"""Needles one after another over the whole row: no haystack, only wrong answers."""

from __future__ import annotations

from lcx.core.errors import UserError
from lcx.data.tasks.base import LETTERS, RetrievalTask


class KeyValue(RetrievalTask):
    """As many needles as fit."""

    def _present(self, length: int, asked: int, needles: int | None) -> int:
        body = length + 1 - asked * self.line_length
        present = min(body // self.line_length - 1, len(LETTERS) ** self.config.key_length)
        if present < asked:
            raise UserError(f"a row of {length} tokens holds {max(present, 0)} lines with {asked} queries; lower task.queries")
        return present
