"""What assembled documents are made of: spans of curated ones, in order.

Legend: D curated documents, N assembled documents, S spans.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lcx.core.files import opened_atomically


class Span(NamedTuple):
    """Bytes `start` to `end` of a document, and their length in the unit of the target."""

    document: int
    start: int
    end: int
    length: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Assembled document i has spans `splits[i]` to `splits[i + 1]` of `document`, `start`, `end`, `length` (int64 `[S]`).

    `left` names for each document of which nothing is used the reason, by its number.
    """

    splits: np.ndarray
    document: np.ndarray
    start: np.ndarray
    end: np.ndarray
    length: np.ndarray
    left: dict[int, str]

    def __len__(self) -> int:
        return len(self.splits) - 1

    def spans(self, number: int) -> list[Span]:
        """The spans of one assembled document."""
        own = slice(self.splits[number], self.splits[number + 1])
        columns = (self.document[own], self.start[own], self.end[own], self.length[own])
        return [Span(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def save(self, path: pathlib.Path) -> None:
        """Write to a file that `load` reads."""
        reasons = sorted(set(self.left.values()))
        with opened_atomically(path) as file:
            np.savez(
                file,
                splits=self.splits,
                spans=np.stack([self.document, self.start, self.end, self.length]),
                left=np.array([[number, reasons.index(reason)] for number, reason in sorted(self.left.items())], np.int64),
                reasons=np.array(reasons, np.str_),
            )


def load(path: pathlib.Path) -> Plan:
    """What `Plan.save` wrote."""
    with np.load(path) as stored:
        reasons = stored["reasons"].tolist()
        left = {number: reasons[reason] for number, reason in stored["left"].reshape(-1, 2).tolist()}
        return Plan(stored["splits"], *stored["spans"], left)


class Builder:
    """Joins spans into documents, each of which ends with the span that brings it to `target`; `gap` lies between two spans."""

    def __init__(self, target: int, gap: int, keep_short: bool) -> None:
        self._target, self._gap, self._keep_short = target, gap, keep_short
        self._documents: list[list[Span]] = []
        self._open: list[Span] = []
        self._length = 0

    def add(self, span: Span) -> bool:
        """Put a span behind the last one; True if the document is complete with it."""
        self._length += span.length + (self._gap if self._open else 0)
        self._open.append(span)
        if self._length < self._target:
            return False
        self._close()
        return True

    def end(self) -> None:
        """Parts have run out: the open document is kept or dropped as it is."""
        if self._keep_short and self._open:
            self._close()
        self.discard()

    def discard(self) -> None:
        """Forget the open document, whose parts are put to other use."""
        self._open, self._length = [], 0

    def _close(self) -> None:
        self._documents.append(self._open)
        self.discard()

    def plan(self, documents: int, reasons: dict[int, str]) -> Plan:
        """All complete documents; of the `documents` there were, what is not in them is `too_short` or left for another reason."""
        return of(self._documents, documents, reasons)


def of(assembled: Sequence[Sequence[Span]], documents: int, reasons: dict[int, str]) -> Plan:
    """The plan of some assembled documents; what is in none of them is left over, as `too_short` unless `reasons` knows better."""
    spans = [span for spans in assembled for span in spans]
    columns = np.array(spans, np.int64).reshape(-1, 4).T
    used = set(columns[0].tolist())
    splits = np.cumsum([0, *(len(spans) for spans in assembled)], dtype=np.int64)
    left = {number: reasons.get(number, "too_short") for number in range(documents) if number not in used}
    return Plan(splits, *columns, left)
