"""Rows of a mixture as text: what each token says, the weight of the loss on it, and where the row's documents begin.

Legend: T tokens in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from lcx.core.batch import PADDING, Batch
from lcx.data.loader import Loader, TextPart, unmapped
from lcx.data.report import spread_steps
from lcx.data.tokenizers.stream import pieces
from lcx.data.tokenizers.tokenizers import Tokenizer

WHOLE = 4096
"""Tokens of a row that is shown in full."""
_AROUND, _HEAD, _TAIL, _MOST = 96, 384, 768, 3072
"""Of a longer row: tokens on both sides of what is of interest, at its ends, and in all."""
_STEPS = 512
"""Steps that are looked through for rows of every part."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token at its place in the row; `weight` is that of the loss on predicting it, `special` says that it is no text.

    One with `is_target` is what the row's last token has to predict; it stands behind the row and is no input of it.
    """

    place: int
    text: str
    weight: float
    special: bool = False
    is_target: bool = False


@dataclasses.dataclass(frozen=True)
class Span:
    """Places `start` to `end` of a row hold tokens `first` to `last` of a document's `length`, at `positions` (first and last)."""

    start: int
    end: int
    name: str
    first: int
    last: int
    length: int
    positions: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class RowText:
    """A row: its part, its step and its place in the batch, and what it was made from.

    `tokens` are those shown, in order of places, without padding; in a long row most are left out. `weights` float32 `[T]` are the
    batch's own, each at the place that predicts.
    """

    part: str
    step: int
    row: int
    about: str
    filled: int
    weights: np.ndarray
    tokens: tuple[Token, ...]
    spans: tuple[Span, ...]


def row_texts(loader: Loader, count: int) -> list[RowText]:
    """About `count` rows of a mixture, of each part as many as its share asks for and at least one, ordered by part.

    They are the first ones of the stage, or of steps that are spread over it where weights change within it.
    """
    wanted = {i: max(1, round(count * share)) for i, share in enumerate(loader.shares.tolist())}
    return sorted((_row(loader, *place) for place in _places(loader, wanted)), key=lambda one: (one.part, one.step, one.row))


def _places(loader: Loader, wanted: dict[int, int]) -> Iterator[tuple[int, int]]:
    """(step, row of the batch) of as many rows of each part as are wanted."""
    left = dict(wanted)
    for step in spread_steps(loader, _STEPS):
        parts, _ = loader.addresses(step)
        for row, part in enumerate(parts.tolist()):
            if left[part]:
                left[part] -= 1
                yield step, row
        if not any(left.values()):
            return


def _row(loader: Loader, step: int, row: int) -> RowText:
    batch = loader.batch(step, slice(row, row + 1))
    part, number = (found[0] for found in loader.addresses(step, slice(row, row + 1)))
    filled = int((batch.segments[0] != PADDING).sum())
    spans = tuple(_spans(loader, int(part), int(number), batch))
    return RowText(
        part=loader.names[part],
        step=step,
        row=row,
        about=loader.parts[part].describe(int(number)),
        filled=filled,
        weights=np.asarray(batch.loss_weights[0]),
        tokens=tuple(_tokens(loader.corpus.tokenizer, batch, filled, spans)),
        spans=spans,
    )


def _spans(loader: Loader, part: int, number: int, batch: Batch) -> Iterator[Span]:
    """The documents of a row of packed text."""
    own = unmapped(loader.parts[part])
    if not isinstance(own, TextPart):
        return
    at = int(own.config.packing.shared_bos)
    for document, first, last in own.plan.spans(number):
        end = at + last - first
        positions = int(batch.positions[0, at]), int(batch.positions[0, end - 1])
        yield Span(at, end, own.source.name(document), first, last, int(own.source.lengths[document]), positions)
        at = end


def _tokens(tokenizer: Tokenizer, batch: Batch, filled: int, spans: tuple[Span, ...]) -> Iterator[Token]:
    """The tokens that are shown."""
    tokens, targets, weights = batch.tokens[0], batch.targets[0], batch.loss_weights[0]
    # Inside of a row a place predicts the token behind it, or has no weight; what the last place predicts is not in the row.
    on_token = np.append(np.float32(0), weights[:-1])
    for start, end in windows(on_token[:filled], [span.start for span in spans]):
        shown = zip(range(start, end), tokens[start:end].tolist(), pieces(tokenizer, tokens[start:end]), strict=True)
        for place, token, text in shown:
            special = tokenizer.special(token)
            yield Token(place, text if special is None else special, float(on_token[place]), special is not None)
    if weights[-1] > 0:
        special = tokenizer.special(int(targets[-1]))
        text = pieces(tokenizer, targets[-1:])[0] if special is None else special
        yield Token(len(tokens), text, float(weights[-1]), special is not None, is_target=True)


def windows(weights: np.ndarray, starts: list[int]) -> list[tuple[int, int]]:
    """The places of a row to show, as (start, end) in order: all of a short row; of a long one both ends, and what is around the
    beginnings of documents and the places at which the weight changes, as far as there is room.

    `weights` float `[T]` are those of the losses on the tokens.
    """
    if len(weights) <= WHOLE:
        return [(0, len(weights))] if len(weights) else []
    shown = np.zeros(len(weights), bool)
    shown[:_HEAD], shown[-_TAIL:] = True, True
    changes = np.flatnonzero(np.diff(weights)) + 1
    for place in sorted({*starts, *changes.tolist()}):
        if shown.sum() + 2 * _AROUND > _MOST:
            break
        shown[max(0, place - _AROUND) : place + _AROUND] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shown, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
