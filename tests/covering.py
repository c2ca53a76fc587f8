"""Pairwise covering arrays: every two settings of every two options meet in at least one row; or each setting, in fewer rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

Row = dict[str, Hashable]
Pair = frozenset[tuple[str, Hashable]]


def pairs_of(row: Mapping[str, Hashable]) -> set[Pair]:
    """All pairs of settings that a row holds."""
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def pairwise(options: Mapping[str, Sequence[Hashable]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Few rows in which all pairs of settings occur, the same ones at every call.

    `allowed` says whether a row, whole or in part, can exist; pairs that cannot are left out.

    Greedy (after AETG): a row starts from a pair that is still missing, and each further option takes the setting that adds the
    most missing pairs.
    """
    missing: dict[Pair, None] = {}
    for (one, ones), (two, twos) in itertools.combinations(options.items(), 2):
        missing.update(dict.fromkeys(frozenset({(one, x), (two, y)}) for x in ones for y in twos if allowed({one: x, two: y})))
    rows: list[Row] = []
    while missing:
        row: Row = dict(sorted(next(iter(missing))))
        for name in sorted((name for name in options if name not in row), key=lambda name: -len(options[name])):
            able = [x for x in options[name] if allowed({**row, name: x})]
            row[name] = max(able, key=lambda x: sum(p in missing for p in pairs_of({**row, name: x})))
        for pair in pairs_of(row):
            missing.pop(pair, None)
        rows.append({name: row[name] for name in options})
    return rows


def each_setting(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """Some of the rows, the same ones at every call, in which each setting of each option occurs; cheap ones rather than few.

    Greedy: the next row is the one with the most missing settings for its cost, and of equal ones the first.
    """
    missing = {setting for row in rows for setting in row.items()}
    chosen: list[Row] = []
    while missing:
        best = max(rows, key=lambda row: len(missing & row.items()) / cost(row))
        missing -= best.items()
        chosen.append(best)
    return chosen
