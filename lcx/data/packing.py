"""From documents of known lengths to rows: a seeded plan of spans, then the rows' arrays.

Legend: D documents, R rows, S spans, T tokens in a row, n requested rows, m requested columns.

Rules that hold for every combination of options:
- A plan uses every token of every document exactly once as an input token. Nothing is dropped: the last row of a stream and
  the rows of the fitting methods may end in padding (segment `PADDING`, weight 0).
- A document longer than a row is cut into pieces of the row's length and a remainder. For the mask and for reset positions a
  piece is a document of its own: it does not see the previous piece, and its positions restart.
- A token's target is the next token of its own document, even if that is in the next row, and its weight is the target's: 1,
  except in chats, where only what the model writes has weight. A document's last token has weight 0 under a document mask.
  Without one its target is the next document's first token if that is in the same row; otherwise it has weight 0.
- `shared_bos` takes the first place of the row: segment `SHARED`, position 0, weight 0. Documents share the T-1 places after it;
  with reset positions each starts at 1, as if it alone followed the anchor.
- Positions that are not reset count along the row, whatever the mask.
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from lcx.attention.parallel.documents import Documents
from lcx.core.batch import PADDING, SHARED
from lcx.core.errors import UserError
from lcx.data.config import PackingConfig
from lcx.data.sources.sources import Subset, cut, ranges

MOST_RUNS = 16
"""Runs of columns that are read one by one; of more, whole rows are."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which spans each row holds: row i has spans `splits[i]` to `splits[i + 1]` of `document`, `start`, `end` (int64 `[S]`)."""

    splits: np.ndarray
    document: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.splits) - 1

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, end) of one row's spans, in row order."""
        own = slice(self.splits[row], self.splits[row + 1])
        return list(zip(self.document[own].tolist(), self.start[own].tolist(), self.end[own].tolist(), strict=True))

    def fill_ratio(self, capacity: int) -> float:
        """Fraction of the rows' places that hold a document's token."""
        return float((self.end - self.start).sum() / (len(self) * capacity))


def plan(method: str, lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> Plan:
    """A plan over documents of `lengths` int64 `[D]` (all above 0) for rows of `capacity` tokens; `rng` shuffles the documents.

    `concat_then_split`: the shuffled documents form one stream, cut every `capacity` tokens. `first_fit`: in shuffled order,
    each piece goes into the first row with enough room. `best_fit`: from the longest piece to the shortest (equal ones in shuffled
    order), each goes into the fullest row that still has room (arXiv:2404.10830). Raises `UserError` if the capacity is below 1.
    """
    if capacity < 1:
        raise UserError(f"a row has room for {capacity} tokens of documents; use a longer seq_len")
    order = rng.permutation(len(lengths))
    if method == "concat_then_split":
        return _concat(order, lengths[order], capacity)
    document, start, end = _pieces(order, lengths[order], capacity)
    if method == "best_fit":
        longest_first = np.argsort(start - end, kind="stable")
        document, start, end = document[longest_first], start[longest_first], end[longest_first]
    fit = {"first_fit": _first_fit, "best_fit": _best_fit}[method]
    row = fit((end - start).tolist(), capacity)
    by_row = np.argsort(row, kind="stable")
    counts = np.bincount(row)
    return Plan(np.concatenate([[0], np.cumsum(counts)]), document[by_row], start[by_row], end[by_row])


def _concat(order: np.ndarray, lengths: np.ndarray, capacity: int) -> Plan:
    cumulative = np.concatenate([[0], np.cumsum(lengths)])
    starts = np.arange(0, cumulative[-1], capacity)
    row, document, start, end = cut(cumulative, starts, np.minimum(starts + capacity, cumulative[-1]))
    splits = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(starts)))])
    return Plan(splits, order[document], start, end)


def _pieces(order: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = -(-lengths // capacity)
    document = np.repeat(order, counts)
    start = ranges(np.zeros_like(counts), counts) * capacity
    return document, start, np.minimum(start + capacity, np.repeat(lengths, counts))


def _first_fit(sizes: list[int], capacity: int) -> np.ndarray:
    """Row of each piece; each node of a tree over the rows holds the most room of any row below it, so a search is logarithmic."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    rows = np.empty(len(sizes), np.int64)
    for piece, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size
        rows[piece] = node - leaves
        room[node] -= size
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return rows


def _best_fit(sizes: list[int], capacity: int) -> np.ndarray:
    """Row of each piece; open rows are kept sorted by room, then by age."""
    open_rows: list[tuple[int, int]] = []
    rows = np.empty(len(sizes), np.int64)
    count = 0
    for piece, size in enumerate(sizes):
        at = bisect.bisect_left(open_rows, (size, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = capacity, count
            count += 1
        rows[piece] = row
        if room > size:
            bisect.insort(open_rows, (room - size, row))
    return rows


def assemble(
    plan: Plan, rows: np.ndarray, source: Subset, seq_len: int, config: PackingConfig, bos_id: int | None,
    columns: np.ndarray | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The named rows as arrays `[n, T]`: tokens, targets, positions, segments (int32) and weights (float32).

    The plan must have been made for rows of `seq_len - config.shared_bos` tokens. With `columns` int `[m]` the arrays are `[n, m]`,
    those of the whole rows there; of a run of columns only its own tokens are read, and the one behind them. Raises `UserError`
    if the shared anchor is requested and the tokenizer has no begin-of-sequence token.
    """
    if config.shared_bos and bos_id is None:
        raise UserError("packing.shared_bos=True needs a begin-of-sequence token; use tokenizer 'bytes+bos' or set it to False")
    if columns is None:
        return _window(plan, rows, source, seq_len, config, bos_id, 0, seq_len)
    cuts = [0, *(np.flatnonzero(np.diff(columns) != 1) + 1).tolist(), len(columns)]
    if len(cuts) - 1 > MOST_RUNS:
        return {key: x[:, columns] for key, x in assemble(plan, rows, source, seq_len, config, bos_id).items()}
    firsts, stops = columns[cuts[:-1]].tolist(), (columns[np.asarray(cuts[1:]) - 1] + 1).tolist()
    found = [_window(plan, rows, source, seq_len, config, bos_id, *run) for run in zip(firsts, stops, strict=True)]
    return {key: np.concatenate([one[key] for one in found], axis=1) for key in found[0]}


def documents(plan: Plan, row: int, seq_len: int, config: PackingConfig) -> Documents:
    """The documents of a row of `assemble` as its mask has them; no token is read."""
    own = slice(plan.splits[row], plan.splits[row + 1])
    lengths = (plan.end[own] - plan.start[own]).tolist()
    held = lengths if config.mask_documents else [sum(lengths)]
    anchor, left = int(config.shared_bos), seq_len - config.shared_bos - sum(lengths)
    found = [
        *[(1, SHARED)] * anchor,
        *((length, number + 1) for number, length in enumerate(held)),
        *[(left, PADDING)] * (left > 0),
    ]
    return Documents(*np.asarray(found, np.int64).T)


def _window(
    plan: Plan, rows: np.ndarray, source: Subset, seq_len: int, config: PackingConfig, bos_id: int | None, first: int, stop: int
) -> dict[str, np.ndarray]:
    """Columns `first` to `stop - 1` of the rows."""
    # One column more, whose token may be the last one's target.
    stop, wanted = min(stop + 1, seq_len), stop - first
    anchor, shape = int(config.shared_bos), (len(rows), stop - first)
    counts = plan.splits[rows + 1] - plan.splits[rows]
    spans = ranges(plan.splits[rows], counts)
    lengths = plan.end[spans] - plan.start[spans]
    before = np.cumsum(lengths) - lengths
    column = anchor + before - np.repeat(before[np.cumsum(counts) - counts], counts)
    number = ranges(np.ones_like(counts), counts) if config.mask_documents else np.ones_like(lengths)
    row, skipped = np.repeat(np.arange(len(rows)), counts), np.maximum(first - column, 0)
    there = np.minimum(column + lengths, stop) - np.maximum(column, first)
    kept = there > 0
    document, start, lengths = plan.document[spans][kept], (plan.start[spans] + skipped)[kept], there[kept]
    number, row, skipped, column = number[kept], row[kept], skipped[kept], np.maximum(column, first)[kept] - first
    place = ranges(row * shape[1] + column, lengths)

    tokens = source.gather(document, start, start + lengths)
    last = np.cumsum(lengths) - 1
    targets, weights = _targets(tokens, source, document, start, start + lengths, last, row, config.mask_documents)
    columns = np.broadcast_to(np.arange(first, stop, dtype=np.int32), shape)
    out = {
        "tokens": _scatter(shape, place, tokens, 0),
        "targets": _scatter(shape, place, targets, 0),
        "loss_weights": _scatter(shape, place, weights, np.float32(0)),
        "segments": _scatter(shape, place, np.repeat(number, lengths), PADDING),
        "positions": columns.copy(),
    }
    if config.reset_positions:
        out["positions"] = _scatter(shape, place, ranges(anchor + skipped, lengths), 0)
    if config.shared_bos and first == 0:
        out["tokens"][:, 0], out["segments"][:, 0] = bos_id, SHARED
        out["targets"][:, 0] = out["tokens"][:, 1]
    return {key: x[:, :wanted] for key, x in out.items()}


def _targets(tokens, source, document, start, end, last, row, masked) -> tuple[np.ndarray, np.ndarray]:
    """Next token and weight of each token; `last` int64 `[S]` is the index of each span's last token in `tokens`."""
    if not len(tokens):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    targets = np.append(tokens[1:], np.int32(0))
    weights = np.append(source.loss_weights(document, start, end)[1:], np.float32(0))
    goes_on = end < source.lengths[document]
    following = document[goes_on], end[goes_on], end[goes_on] + 1
    targets[last[goes_on]], weights[last[goes_on]] = source.gather(*following), source.loss_weights(*following)
    neighbour = np.append(row[1:] == row[:-1], False) & (not masked)
    weights[last[~goes_on & ~neighbour]] = 0
    targets[last[~goes_on & ~neighbour]] = 0
    return targets, weights


def _scatter(shape: tuple[int, int], place: np.ndarray, values: np.ndarray, fill: np.generic | int) -> np.ndarray:
    out = np.full(shape, fill, np.float32 if isinstance(fill, np.float32) else np.int32)
    out.reshape(-1)[place] = values
    return out
