"""Needles over length and depth: is what stands at depth d of a context of T tokens still found from its end?

Legend: R items, T tokens that a forward pass sees, A answer tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lcx.data.sources.sources import Subset
from lcx.data.tasks import Task
from lcx.evals.results import NeedleGrid
from lcx.evals.scoring import ScorerFor, score_rows

_STREAM = 0x6E65_6564
"""Sets the draws of evaluation apart from training's, whose seeds are numbers without this one among them."""


Generate = Callable[[list[np.ndarray], int], np.ndarray]
"""`(prompts, new tokens) -> int32 [R, new tokens]`, greedily."""


@dataclasses.dataclass(frozen=True)
class Items:
    """The questions of one length: `tokens` int32 and `answer` bool, each `[R, T + 1]`; `cell` int `[R]` is the depth's index."""

    length: int
    tokens: np.ndarray
    answer: np.ndarray
    cell: np.ndarray

    @property
    def reach(self) -> int:
        """How many tokens at the end hold every row's answer."""
        return self.tokens.shape[1] - int(np.argmax(self.answer.any(axis=0)))


def write_items(task: Task, haystack: Subset, length: int, depths: Sequence[float], items: int, seed: int) -> Items:
    """`items` questions at each depth, one queried needle each, among as many others as the task has in training.

    `length` counts all tokens up to the answer's last (what follows it is only ever predicted). Keys, values and text are fresh,
    drawn from `seed`, length and depth; item i does not depend on how many there are.
    """
    cells = [
        task.sample(np.random.default_rng([seed, _STREAM, length, cell]), length, haystack, items, depth=depth)
        for cell, depth in enumerate(depths)
    ]
    tokens = np.concatenate([samples.tokens for samples in cells])
    answer = np.concatenate([samples.answers for samples in cells])
    return Items(length, tokens, answer, np.repeat(np.arange(len(depths)), items))


def teacher_forced(scorer_for: ScorerFor, items: Items, tokens_per_forward: int) -> np.ndarray:
    """Whether every answer token is the most likely one given all tokens before it, bool `[R]`; one forward pass."""
    correct = score_rows(scorer_for(items.length), items.tokens, tokens_per_forward, items.reach).correct
    return np.all(correct | ~items.answer[:, -items.reach :], axis=1)


def generated(generate: Generate, items: Items, tokens_per_forward: int) -> np.ndarray:
    """Whether greedy generation from the tokens before the answer gives the answer, bool `[R]`."""
    found = []
    group = max(1, tokens_per_forward // items.length)
    for first in range(0, len(items.tokens), group):
        rows = range(first, min(first + group, len(items.tokens)))
        wanted = [items.tokens[i][items.answer[i]] for i in rows]
        prompts = [items.tokens[i][: int(np.argmax(items.answer[i]))] for i in rows]
        out = generate(prompts, max(map(len, wanted)))
        found += [bool(np.array_equal(row[: len(answer)], answer)) for row, answer in zip(out, wanted, strict=True)]
    return np.asarray(found)


def grid(
    found: Mapping[int, np.ndarray],
    items: Mapping[int, Items],
    depths: Sequence[float],
    method: str,
    scheme: str,
    trained: int | None,
) -> NeedleGrid:
    """The grid of answers found, bool `[R]` by length, to `items` of the same lengths."""
    lengths = sorted(items)
    counts = [[int(found[length][items[length].cell == cell].sum()) for length in lengths] for cell in range(len(depths))]
    each = len(items[lengths[0]].cell) // len(depths)
    rows = tuple(tuple(row) for row in counts)
    return NeedleGrid(tuple(lengths), tuple(map(float, depths)), rows, each, method, scheme, trained)
