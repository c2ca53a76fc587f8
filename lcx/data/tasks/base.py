"""Retrieval tasks that can only be answered from far back in the row; one sampler serves training and evaluation.

Legend: R rows, T predictions in a row (so T + 1 tokens), n lines (needles), q queries, k letters of a key, v digits of a value.

A row is text (the haystack) with lines written over it, at places that follow no grid and never overlap, and ends in a block
of queries that nothing overwrites:

    #ab=1234    a needle: the key `ab` has the value 1234
    #cd@ab      a renaming: `cd` has the value of `ab`
    ?ab=1234    a query, followed by its answer

Every line ends in a newline. Keys are distinct within a row, and anything in the haystack that reads like a line is removed, so
each answer occurs exactly once in its row as the value of its key. Characters are written as single tokens, so lengths are
exact with every tokenizer. All randomness is a fixed number of uniform numbers per row, of which `RetrievalTask.rows` is a pure
function.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from lcx.core.configs import not_negative, positive
from lcx.core.errors import UserError
from lcx.data.tokenizers.tokenizers import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Settings of a retrieval task; this module describes how its rows are written.

    Counts are per row: `needles` (chains, for variable tracking) and `queries`, each raised to `..._per_1024` times the
    row's length in units of 1,024 tokens if that is more. A key has `key_length` letters and a value `value_length` digits;
    `hops` is the number of renamings in variable tracking. Loss weights: `answer_weight` on the digits to be answered,
    `needle_weight` on the needles' own lines, `query_weight` on the rest of the query lines, `haystack_weight` elsewhere.
    """

    needles: int = 4
    queries: int = 4
    needles_per_1024: float = 0.0
    queries_per_1024: float = 0.0
    hops: int = 2
    key_length: int = 2
    value_length: int = 4
    answer_weight: float = 6.0
    needle_weight: float = 0.0
    query_weight: float = 0.0
    haystack_weight: float = 1.0

    def __post_init__(self) -> None:
        positive("task", needles=self.needles, queries=self.queries, hops=self.hops)
        positive("task", key_length=self.key_length, value_length=self.value_length, answer_weight=self.answer_weight)
        not_negative("task", needles_per_1024=self.needles_per_1024, queries_per_1024=self.queries_per_1024)
        not_negative("task", needle_weight=self.needle_weight, query_weight=self.query_weight, haystack_weight=self.haystack_weight)
        if self.key_length > 8 or self.value_length > 12:
            raise UserError(
                f"task.key_length={self.key_length} must be at most 8 and task.value_length={self.value_length} at most 12"
            )


class Haystack(Protocol):
    """Text that needles are written over, as one stream of tokens."""

    num_tokens: int

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens int32 `[R, length]` from each of `starts`."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Rows of a task.

    `tokens` int32 `[R, T + 1]`; `loss_weights` float32 `[R, T + 1]`, of the token that is predicted; `answers` bool `[R, T + 1]`,
    the values that queries ask for. The last query's answer is the `answer_length` tokens starting at `answer_start` in every row;
    `depths` float64 `[R]` says where the needle that holds it begins: 0 first, 1 last possible place before the queries.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    answers: np.ndarray
    answer_start: int
    answer_length: int
    depths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines of all rows before they are placed: `text` int32 `[R, n, longest]`, `lengths` int64 `[R, n]`."""

    text: np.ndarray
    lengths: np.ndarray


class RetrievalTask:
    """The sampler of rows: `needles` lines at random places, of which `queries` are asked for. Kinds of task override its parts."""

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self._letters = tokenizer.characters(LETTERS)
        self._digits = tokenizer.characters(DIGITS)
        self._needle, self._query, self._equals, self._refers, self._newline = tokenizer.characters("#?=@\n")

    def describe(self, length: int) -> str:
        """What a row of `length` predictions holds."""
        needles, queries = self.counts(length)
        return f"{needles} needles and {queries} queries"

    @property
    def line_length(self) -> int:
        """Length in tokens of a needle with a value, and of a query."""
        return self.config.key_length + self.config.value_length + 3

    def counts(self, length: int, needles: int | None = None, queries: int | None = None) -> tuple[int, int]:
        """(needles or chains, queries) in a row of `length` predictions; raises `UserError` if they do not fit."""
        config = self.config
        asked = queries or max(config.queries, round(config.queries_per_1024 * length / 1024))
        present = self._present(length, asked, needles)
        names = present * self._names_each
        if names > len(LETTERS) ** config.key_length:
            raise UserError(f"{names} keys of task.key_length={config.key_length} letters cannot all differ; raise key_length")
        if asked > present:
            raise UserError(f"task.queries={asked} exceeds the {present} needles of a row; lower it or raise task.needles")
        return present, asked

    def uniforms(self, length: int, **counts: int | None) -> int:
        """How many uniform numbers in [0, 1) a row of `length` predictions needs."""
        present, _ = self.counts(length, **counts)
        return 2 + 3 * present + 4 * present * self._names_each

    @property
    def _names_each(self) -> int:
        """How many keys a needle, or chain, takes."""
        return 1

    def _present(self, length: int, asked: int, needles: int | None) -> int:
        """How many needles, or chains, stand in a row of `length` predictions with `asked` queries."""
        return needles or max(self.config.needles, round(self.config.needles_per_1024 * length / 1024))

    def sample(
        self,
        rng: np.random.Generator,
        length: int,
        haystack: Haystack,
        count: int = 1,
        *,
        depth: float | None = None,
        needles: int | None = None,
        queries: int | None = None,
    ) -> Samples:
        """`count` fresh rows of `length` predictions; if `depth` (0 to 1) is given, the last query's needle is placed there.

        `needles` and `queries` override the configured counts; giving only `depth` implies one query. Raises `UserError` if the
        row or the haystack is too short for them.
        """
        queries = 1 if depth is not None and queries is None else queries
        drawn = rng.random((count, self.uniforms(length, needles=needles, queries=queries)))
        return self.rows(drawn, length, haystack, depth=depth, needles=needles, queries=queries)

    def rows(
        self,
        uniforms: np.ndarray,
        length: int,
        haystack: Haystack,
        *,
        depth: float | None = None,
        needles: int | None = None,
        queries: int | None = None,
    ) -> Samples:
        """The rows determined by `uniforms` float64 `[R, self.uniforms(length)]`; each depends only on its own numbers."""
        present, asked = self.counts(length, needles, queries)
        draw = Draw(uniforms)
        body = length + 1 - asked * self.line_length
        lines, target_keys, values, holders = self._lines(draw, present)
        _check_room(length, body, int(lines.lengths[0].sum()), self.line_length, asked)
        if haystack.num_tokens < body:
            raise UserError(f"the haystack has {haystack.num_tokens} tokens, but a row needs {body}; use a larger corpus")
        chosen = draw.permutation(present)[:, :asked]
        if depth is None:
            starts = _scattered(draw, lines.lengths, body)
        else:
            starts = self._around(draw, depth, present, body)
            chosen = np.concatenate([_without(chosen, 0)[:, : asked - 1], np.zeros((len(chosen), 1), np.int64)], 1)
        text = self._clean(haystack.windows(draw.integers(1, haystack.num_tokens - body + 1)[:, 0], body))
        return self._write(text, lines, starts, target_keys, values, holders, chosen)

    def _write(self, text, lines: Lines, starts, keys, values, holders, chosen) -> Samples:
        """The arrays: haystack, then lines at `starts`, then the queries of the `chosen` chains."""
        config, rows, asked = self.config, len(text), chosen.shape[1]
        body, key_length = text.shape[1], config.key_length
        queries = self._line(self._query, _take(keys, chosen), self._equals, _take(values, chosen))
        tokens = np.concatenate([text, queries.reshape(rows, -1)], 1)
        loss_weights = np.full(tokens.shape, config.haystack_weight, np.float32)
        loss_weights[:, body:] = config.query_weight
        at = (np.arange(rows) * tokens.shape[1])[:, None, None] + starts[:, :, None] + np.arange(lines.text.shape[2])
        is_token = np.arange(lines.text.shape[2]) < lines.lengths[:, :, None]
        tokens.reshape(-1)[at[is_token]] = lines.text[is_token]
        loss_weights.reshape(-1)[at[is_token]] = config.needle_weight
        answers = np.zeros(tokens.shape, bool)
        block = answers[:, body:].reshape(rows, asked, self.line_length)
        block[:, :, key_length + 2 : -1] = True
        answers[:, body:] = block.reshape(rows, -1)
        loss_weights[answers] = config.answer_weight
        holder = np.take_along_axis(holders, chosen[:, -1:], 1)
        depths = np.take_along_axis(starts, holder, 1)[:, 0] / max(body - self.line_length, 1)
        start = tokens.shape[1] - 1 - config.value_length
        return Samples(tokens, loss_weights, answers, start, config.value_length, depths)

    def _around(self, draw: Draw, depth: float, present: int, body: int) -> np.ndarray:
        """Starts `[R, n]` with line 0 at `depth` of the possible places and the others scattered on both sides of it."""
        if not 0 <= depth <= 1:
            raise UserError(f"depth={depth} must be a fraction of the row, from 0 to 1")
        size = self.line_length
        fixed, others = round(depth * (body - size)), present - 1
        rows = draw.take(1).shape[0]
        room_left, room_right = fixed // size, (body - fixed - size) // size
        if others > room_left + room_right:
            raise UserError(
                f"{present} needles of {size} tokens do not fit into {body} with one at depth {depth}; lower task.needles"
            )
        share = fixed / max(body - size, 1)
        left = (draw.take(others) < share).sum(1, keepdims=True).clip(max(0, others - room_right), min(others, room_left))
        is_left = np.arange(others) < left
        free = np.where(is_left, fixed - left * size, body - fixed - size - (others - left) * size)
        gaps = (draw.take(others) * (free + 1)).astype(np.int64) + np.where(is_left, 0, body)
        gaps = np.sort(gaps, axis=1) - np.where(is_left, 0, body)
        rank = np.arange(others) - np.where(is_left, 0, left)
        starts = gaps + rank * size + np.where(is_left, 0, fixed + size)
        return np.concatenate([np.full((rows, 1), fixed), starts], 1)

    def _lines(self, draw: Draw, present: int) -> tuple[Lines, np.ndarray, np.ndarray, np.ndarray]:
        """Lines in the order of their places, and for each chain the queried key, its value and the line that holds the value."""
        keys, values, whole = self._needles(draw, present)
        lengths = np.full(whole.shape[:2], whole.shape[2])
        return Lines(whole, lengths), keys, values, np.broadcast_to(np.arange(present), lengths.shape)

    def _needles(self, draw: Draw, present: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys, the values, and the lines of the keys that have one."""
        config, names = self.config, present * self._names_each
        values = self._spell(draw.integers(present, 10**config.value_length), config.value_length, self._digits)
        keys = self._spell(self._distinct(draw, names), config.key_length, self._letters)
        return keys, values, self._line(self._needle, keys[:, :present], self._equals, values)

    def _distinct(self, draw: Draw, names: int) -> np.ndarray:
        """Numbers of different keys."""
        return draw.distinct(names, len(LETTERS) ** self.config.key_length)

    def _line(self, mark: int, left: np.ndarray, between: int, right: np.ndarray) -> np.ndarray:
        edge = np.ones((*left.shape[:2], 1), np.int32)
        return np.concatenate([edge * mark, left, edge * between, right, edge * self._newline], 2)

    def _spell(self, numbers: np.ndarray, length: int, alphabet: np.ndarray) -> np.ndarray:
        base = len(alphabet) ** np.arange(length - 1, -1, -1, dtype=np.int64)
        return alphabet[numbers[:, :, None] // base % len(alphabet)]

    def _clean(self, text: np.ndarray) -> np.ndarray:
        """The haystack with the mark of anything that would read as a needle or a query replaced by a newline."""
        gap = self.config.key_length + 1
        mark, between = text[:, :-gap], text[:, gap:]
        reads = ((mark == self._needle) | (mark == self._query)) & ((between == self._equals) | (between == self._refers))
        mark[reads] = self._newline
        return text


class Draw:
    """Uniform numbers `[R, M]`, consumed from the left in the form that is needed."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self._uniforms, self._used = uniforms, 0

    def take(self, count: int) -> np.ndarray:
        """The next numbers `[R, count]`."""
        self._used += count
        return self._uniforms[:, self._used - count : self._used]

    def integers(self, count: int, below: int | np.ndarray) -> np.ndarray:
        """Integers `[R, count]` from 0 to below - 1."""
        return (self.take(count) * below).astype(np.int64)

    def permutation(self, count: int) -> np.ndarray:
        """Random orders `[R, count]` of 0 to count - 1."""
        return np.argsort(self.take(count), axis=1, kind="stable")

    def distinct(self, count: int, below: int) -> np.ndarray:
        """Different integers `[R, count]` below `below`, in random order, without rejection."""
        rising = np.sort(self.integers(count, below - count + 1), axis=1) + np.arange(count)
        return np.take_along_axis(rising, self.permutation(count), 1)


def _scattered(draw: Draw, lengths: np.ndarray, body: int) -> np.ndarray:
    """Starts `[R, n]` of lines in `body` tokens: the free space is divided between them at random, so none can overlap."""
    free = body - lengths.sum(1, keepdims=True)
    gaps = np.sort((draw.take(lengths.shape[1]) * (free + 1)).astype(np.int64), axis=1)
    return gaps + np.cumsum(lengths, axis=1) - lengths


def _without(chosen: np.ndarray, value: int) -> np.ndarray:
    """Each row with `value` moved to the end."""
    return np.take_along_axis(chosen, np.argsort(chosen == value, axis=1, kind="stable"), 1)


def _take(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, chosen[:, :, None], 1)


def _check_room(length: int, body: int, needed: int, size: int, asked: int) -> None:
    if needed > body:
        raise UserError(
            f"a row of {length} tokens has {max(body, 0)} left before its {asked} queries of {size} tokens, but the needles need "
            f"{needed}; lower task.needles or task.queries, or use a longer seq_len"
        )
