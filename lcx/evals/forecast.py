"""How long the rest of an evaluation takes, by what its cells have taken so far.

A cell is one task under one scheme at one length. One that is still to come is taken to cost, per unit of work, what the nearest
measured one did: of the same task and scheme, else of the same task, else of all together; of several, the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """One measurement; `work` is in any unit that all cells of an evaluation share."""

    task: str
    scheme: str
    length: int
    work: float


def remaining(coming: Sequence[Cell], seconds: Mapping[Cell, float]) -> float | None:
    """Seconds that the cells which are still to come take in all, by the `seconds` of measured ones; None if there are none."""
    return sum(_predicted(cell, seconds) for cell in coming) if seconds else None


def _predicted(cell: Cell, seconds: Mapping[Cell, float]) -> float:
    same_task = [one for one in seconds if one.task == cell.task]
    nearest = [one for one in same_task if one.scheme == cell.scheme] or same_task
    measured = [max(nearest, key=lambda one: one.length)] if nearest else list(seconds)
    return cell.work * sum(seconds[one] for one in measured) / sum(one.work for one in measured)
