"""A value behind a chain of names: `#ab=1234`, later `#cd@ab`, later `#ef@cd`; the query `?ef=1234` follows the chain back."""

from __future__ import annotations

import numpy as np

from lcx.core.errors import UserError
from lcx.data.tasks.base import Draw, Lines, RetrievalTask


class VariableTracking(RetrievalTask):
    """Chains of `hops` renamings."""

    @property
    def _names_each(self) -> int:
        return self.config.hops + 1

    def _around(self, draw: Draw, depth: float, present: int, body: int) -> np.ndarray:
        raise UserError("variable_tracking places a chain of lines rather than one needle; remove depth")

    def _lines(self, draw: Draw, present: int) -> tuple[Lines, np.ndarray, np.ndarray, np.ndarray]:
        keys, values, whole = self._needles(draw, present)
        key_length, hops, names = self.config.key_length, self._names_each, keys.shape[1]
        # Which chain each place belongs to is random; the lines of a chain keep their order.
        chain = draw.permutation(names) % present
        place = np.argsort(chain, axis=1, kind="stable").reshape(-1, present, hops)
        later = keys.reshape(len(keys), hops, present, -1)
        renamed = later[:, 1:].reshape(len(keys), -1, key_length)
        refer = self._line(self._needle, renamed, self._refers, keys[:, : names - present])
        longest = max(whole.shape[2], refer.shape[2])
        text = np.zeros((len(keys), names, longest), np.int32)
        lengths = np.empty((len(keys), names), np.int64)
        row = np.arange(len(keys))[:, None]
        text[row, place[:, :, 0], : whole.shape[2]] = whole
        lengths[row, place[:, :, 0]] = whole.shape[2]
        follow = place[:, :, 1:].transpose(0, 2, 1).reshape(len(keys), -1)
        text[row, follow, : refer.shape[2]] = refer
        lengths[row, follow] = refer.shape[2]
        return Lines(text, lengths), later[:, -1], values, place[:, :, 0]
