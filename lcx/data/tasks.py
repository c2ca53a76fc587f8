"""Retrieval tasks that can only be answered from far back in the row; one sampler serves training and evaluation.

Legend: R rows, T predictions in a row (so T + 1 tokens), n lines (needles), q queries, k letters of a key, v digits of a value.

A row is text (the haystack) with lines written over it, at places that follow no grid and never overlap, and ends in a block
of queries that nothing overwrites:

    multikey            `#ab=1234` needles, `?ab=1234` queries: which value belongs to the key
    passkey             the same with one needle, whose key is always the same
    key_value           needles one after another over the whole row: no haystack, only wrong answers
    variable_tracking   `#ab=1234`, later `#cd@ab`, later `#ef@cd`: the query `?ef=1234` follows the chain back

Every line ends in a newline. Keys are distinct within a row, and anything in the haystack that reads like a line is removed, so
each answer occurs exactly once in its row as the value of its key. Characters are written as single tokens, so lengths are
exact with every tokenizer. All randomness is a fixed number of uniform numbers per row: `Task.rows` is a pure function of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lcx.core.batch import Batch
from lcx.core.configs import choice
from lcx.core.errors import UserError
from lcx.data.config import TASKS, TaskConfig
from lcx.data.sources.sources import Subset
from lcx.data.tokenizers.tokenizers import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"


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

    def batch(self) -> Batch:
        """The rows as a `Batch` of NumPy arrays `[R, T]`, one document each."""
        rows, length = self.tokens.shape[0], self.tokens.shape[1] - 1
        order = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
        return Batch(self.tokens[:, :-1], self.tokens[:, 1:], self.loss_weights[:, 1:], order, order.copy(), np.ones_like(order))


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines of all rows before they are placed: `text` int32 `[R, n, longest]`, `lengths` int64 `[R, n]`."""

    text: np.ndarray
    lengths: np.ndarray


class Task:
    """The sampler of one kind of task with one tokenizer."""

    def __init__(self, kind: str, config: TaskConfig, tokenizer: Tokenizer) -> None:
        self.kind, self.config = choice("task.kind", kind, TASKS), config
        self._letters = tokenizer.characters(LETTERS)
        self._digits = tokenizer.characters(DIGITS)
        self._needle, self._query, self._equals, self._refers, self._newline = tokenizer.characters("#?=@\n")

    @property
    def line_length(self) -> int:
        """Length in tokens of a needle with a value, and of a query."""
        return self.config.key_length + self.config.value_length + 3

    def counts(self, length: int, needles: int | None = None, queries: int | None = None) -> tuple[int, int]:
        """(needles or chains, queries) in a row of `length` predictions; raises `UserError` if they do not fit."""
        config = self.config
        asked = queries or max(config.queries, round(config.queries_per_1024 * length / 1024))
        if self.kind == "passkey":
            return 1, 1
        body = length + 1 - asked * self.line_length
        if self.kind == "key_value":
            present = min(body // self.line_length - 1, len(LETTERS) ** config.key_length)
        else:
            present = needles or max(config.needles, round(config.needles_per_1024 * length / 1024))
        names = self._names(present)
        if names > len(LETTERS) ** config.key_length:
            raise UserError(f"{names} keys of task.key_length={config.key_length} letters cannot all differ; raise key_length")
        if self.kind == "key_value" and present < asked:
            raise UserError(f"a row of {length} tokens holds {max(present, 0)} lines with {asked} queries; lower task.queries")
        if asked > present:
            raise UserError(f"task.queries={asked} exceeds the {present} needles of a row; lower it or raise task.needles")
        return present, asked

    def uniforms(self, length: int, **counts: int | None) -> int:
        """How many uniform numbers in [0, 1) a row of `length` predictions needs."""
        present, _ = self.counts(length, **counts)
        return 2 + 3 * present + 4 * self._names(present)

    def _names(self, present: int) -> int:
        return present * (self.config.hops + 1 if self.kind == "variable_tracking" else 1)

    def sample(
        self,
        rng: np.random.Generator,
        length: int,
        haystack: Subset,
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
        haystack: Subset,
        *,
        depth: float | None = None,
        needles: int | None = None,
        queries: int | None = None,
    ) -> Samples:
        """The rows determined by `uniforms` float64 `[R, self.uniforms(length)]`; each depends only on its own numbers."""
        present, asked = self.counts(length, needles, queries)
        draw = _Draw(uniforms)
        body = length + 1 - asked * self.line_length
        lines, target_keys, values, holders = self._lines(draw, present)
        _check_room(length, body, int(lines.lengths[0].sum()), self.line_length, asked)
        if haystack.num_tokens < body:
            raise UserError(f"the haystack has {haystack.num_tokens} tokens, but a row needs {body}; use a larger corpus")
        chosen = draw.permutation(present)[:, :asked]
        if depth is None:
            starts = _scattered(draw, lines.lengths, body)
        else:
            if self.kind == "variable_tracking":
                raise UserError("variable_tracking places a chain of lines rather than one needle; remove depth")
            starts = _around(draw, depth, present, self.line_length, body)
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
        real = np.arange(lines.text.shape[2]) < lines.lengths[:, :, None]
        tokens.reshape(-1)[at[real]] = lines.text[real]
        loss_weights.reshape(-1)[at[real]] = config.needle_weight
        answers = np.zeros(tokens.shape, bool)
        block = answers[:, body:].reshape(rows, asked, self.line_length)
        block[:, :, key_length + 2 : -1] = True
        answers[:, body:] = block.reshape(rows, -1)
        loss_weights[answers] = config.answer_weight
        holder = np.take_along_axis(holders, chosen[:, -1:], 1)
        depths = np.take_along_axis(starts, holder, 1)[:, 0] / max(body - self.line_length, 1)
        start = tokens.shape[1] - 1 - config.value_length
        return Samples(tokens, loss_weights, answers, start, config.value_length, depths)

    def _lines(self, draw: _Draw, present: int) -> tuple[Lines, np.ndarray, np.ndarray, np.ndarray]:
        """Lines in the order of their places, and for each chain the queried key, its value and the line that holds the value."""
        config = self.config
        names, hops = self._names(present), self._names(1)
        values = self._spell(draw.integers(present, 10**config.value_length), config.value_length, self._digits)
        distinct = draw.distinct(names, len(LETTERS) ** config.key_length)
        if self.kind == "passkey":
            distinct = np.full_like(distinct, len(LETTERS) ** config.key_length // 2)
        keys = self._spell(distinct, config.key_length, self._letters)
        whole = self._line(self._needle, keys[:, :present], self._equals, values)
        if hops == 1:
            lengths = np.full(whole.shape[:2], whole.shape[2])
            return Lines(whole, lengths), keys, values, np.broadcast_to(np.arange(present), lengths.shape)
        # Which chain each place belongs to is random; the lines of a chain keep their order.
        chain = draw.permutation(names) % present
        place = np.argsort(chain, axis=1, kind="stable").reshape(-1, present, hops)
        later = keys.reshape(len(keys), hops, present, -1)
        renamed = later[:, 1:].reshape(len(keys), -1, config.key_length)
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


class _Draw:
    """Uniform numbers `[R, M]`, consumed from the left in the form that is needed."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self._uniforms, self._used = uniforms, 0

    def take(self, count: int) -> np.ndarray:
        self._used += count
        return self._uniforms[:, self._used - count : self._used]

    def integers(self, count: int, below: int | np.ndarray) -> np.ndarray:
        """Integers `[R, count]` from 0 to below - 1."""
        return (self.take(count) * below).astype(np.int64)

    def permutation(self, count: int) -> np.ndarray:
        return np.argsort(self.take(count), axis=1, kind="stable")

    def distinct(self, count: int, below: int) -> np.ndarray:
        """Different integers `[R, count]` below `below`, in random order, without rejection."""
        rising = np.sort(self.integers(count, below - count + 1), axis=1) + np.arange(count)
        return np.take_along_axis(rising, self.permutation(count), 1)


def _scattered(draw: _Draw, lengths: np.ndarray, body: int) -> np.ndarray:
    """Starts `[R, n]` of lines in `body` tokens: the free space is divided between them at random, so none can overlap."""
    free = body - lengths.sum(1, keepdims=True)
    gaps = np.sort((draw.take(lengths.shape[1]) * (free + 1)).astype(np.int64), axis=1)
    return gaps + np.cumsum(lengths, axis=1) - lengths


def _around(draw: _Draw, depth: float, present: int, size: int, body: int) -> np.ndarray:
    """Starts `[R, n]` with line 0 at `depth` of the possible places and the others scattered on both sides of it."""
    if not 0 <= depth <= 1:
        raise UserError(f"depth={depth} must be a fraction of the row, from 0 to 1")
    fixed, others = round(depth * (body - size)), present - 1
    rows = draw.take(1).shape[0]
    room_left, room_right = fixed // size, (body - fixed - size) // size
    if others > room_left + room_right:
        raise UserError(f"{present} needles of {size} tokens do not fit into {body} with one at depth {depth}; lower task.needles")
    share = fixed / max(body - size, 1)
    left = (draw.take(others) < share).sum(1, keepdims=True).clip(max(0, others - room_right), min(others, room_left))
    is_left = np.arange(others) < left
    free = np.where(is_left, fixed - left * size, body - fixed - size - (others - left) * size)
    gaps = (draw.take(others) * (free + 1)).astype(np.int64) + np.where(is_left, 0, body)
    gaps = np.sort(gaps, axis=1) - np.where(is_left, 0, body)
    rank = np.arange(others) - np.where(is_left, 0, left)
    starts = gaps + rank * size + np.where(is_left, 0, fixed + size)
    return np.concatenate([np.full((rows, 1), fixed), starts], 1)


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
