"""Tokenised documents with random access, and the held-out split.

Legend: D documents, S spans (document, start, end), R rows, T tokens in a row.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.data.chat import chat, join
from lcx.data.config import SourceConfig
from lcx.data.sources import documents
from lcx.data.sources.prepared import checked_meta, open_prepared
from lcx.data.tokenizers.tokenizers import Tokenizer

Split = Literal["train", "heldout"]


class Source(Protocol):
    """Documents of tokens: `names` (D strings), `lengths` int64 `[D]` (all above 0), `hashes` uint64 `[D]` of the text.

    `weighted` is True if some tokens have a loss weight other than 1.
    """

    names: Sequence[str]
    lengths: np.ndarray
    hashes: np.ndarray
    weighted: bool

    def gather(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Tokens int32 of the spans `[S]`, concatenated."""

    def loss_weights(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Loss weights float32 of the spans' tokens, each at the place of its own token; called only for weighted sources."""


class InMemorySource:
    """A source that keeps all tokens in one array, in the smallest dtype that fits the vocabulary.

    `loss_weights` are each document's loss weights, float32; None means 1 everywhere.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokens: Sequence[np.ndarray],
        hashes: Sequence[int],
        vocab_size: int,
        loss_weights: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.names = list(names)
        self.lengths = np.asarray([len(x) for x in tokens], np.int64)
        self.hashes = np.asarray(hashes, np.uint64)
        self._flat = np.concatenate(tokens).astype(np.min_scalar_type(vocab_size - 1))
        self._offsets = np.cumsum(self.lengths) - self.lengths
        self._loss_weights = None if loss_weights is None else np.concatenate(loss_weights)
        self.weighted = loss_weights is not None

    def gather(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Tokens int32 of the spans, concatenated."""
        return self._flat[ranges(self._offsets[documents] + starts, ends - starts)].astype(np.int32)

    def loss_weights(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Loss weights float32 of the spans' tokens."""
        return self._loss_weights[ranges(self._offsets[documents] + starts, ends - starts)]


class Subset:
    """Some of a source's documents, usable as a source and as one stream in their order."""

    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source, self.ids = source, np.asarray(ids, np.int64)
        self.lengths, self.hashes = source.lengths[self.ids], source.hashes[self.ids]
        self.cumulative = np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def names(self) -> Sequence[str]:
        """Names of the documents."""
        return [self.source.names[i] for i in self.ids]

    def name(self, document: int) -> str:
        """One document's name."""
        return self.source.names[self.ids[document]]

    def gather(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Tokens int32 of the spans, concatenated."""
        return self.source.gather(self.ids[documents], starts, ends)

    @property
    def weighted(self) -> bool:
        """Whether some tokens have a loss weight other than 1."""
        return self.source.weighted

    def loss_weights(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Loss weights float32 of the spans' tokens."""
        if not self.weighted:
            return np.ones(int((ends - starts).sum()), np.float32)
        return self.source.loss_weights(self.ids[documents], starts, ends)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.cumulative[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens int32 `[R, length]` of the stream, starting at each of `starts` `[R]`."""
        _, *spans = cut(self.cumulative, starts, starts + length)
        return self.gather(*spans).reshape(len(starts), length)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...` of every range, concatenated, int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def cut(cumulative: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Spans of a stream of documents: (index of the interval, document, start, end), each int64 `[S]`.

    `cumulative` int64 `[D + 1]` are the documents' boundaries in the stream, `starts < ends` `[R]` the intervals to cover.
    """
    first = np.searchsorted(cumulative, starts, "right") - 1
    counts = np.searchsorted(cumulative, ends, "left") - first
    row = np.repeat(np.arange(len(starts)), counts)
    document = ranges(first, counts)
    begin = cumulative[document]
    return row, document, np.maximum(starts[row] - begin, 0), np.minimum(ends[row], cumulative[document + 1]) - begin


def text_hash(text: bytes) -> int:
    """64-bit hash of a document's text, the same on every machine and for every tokenizer."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def eos_tail(append_eos: bool, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens to append to each document: int32 `[0]` or `[1]`; raises `UserError` if the tokenizer has no such token."""
    if append_eos and tokenizer.eos_id is None:
        raise UserError(
            f"source.append_eos=True needs an end-of-sequence token, and tokenizer {tokenizer.fingerprint!r} has none; "
            "use tokenizer 'bytes+eos' or set it to False"
        )
    return np.asarray([tokenizer.eos_id] if append_eos else [], np.int32)


def encode(tokenizer: Tokenizer, text: bytes, parts: Sequence[documents.Part], tail: np.ndarray) -> np.ndarray:
    """Ids int32 `[n]` of a document with `tail` behind it, none if the text has none.

    In an assembled document the tail, if it is not empty, stands behind each part, in place of the separator.
    """
    pieces = [text[start:end] for start, end in parts] if len(tail) and parts else [text]
    ids = [found for found in map(tokenizer.encode, pieces) if len(found)]
    return np.concatenate([one for found in ids for one in (found, tail)]) if ids else np.zeros(0, np.int32)


def load(config: SourceConfig, tokenizer: Tokenizer, chat_template: str | None = None) -> Source:
    """The source that `config` names, tokenised; a prepared one (`array_record`) is opened and read lazily.

    Documents without tokens are left out. `chat_template` is the path of the template for chats (None: the tokenizer's own).
    Raises `UserError` for a missing or empty corpus, for a prepared one of another tokenizer, and for a conversation in which the
    model writes nothing or that the template rejects.
    """
    if config.kind == "array_record":
        return open_prepared(config, tokenizer)
    if config.kind == "chat":
        return _load_chats(config, chat.load(tokenizer, chat_template))
    tail = eos_tail(config.append_eos, tokenizer)
    names, tokens, hashes = [], [], []
    for name, text, parts in documents.read_parts(config):
        ids = encode(tokenizer, text, parts, tail)
        if len(ids):
            names.append(name)
            tokens.append(ids.astype(np.min_scalar_type(tokenizer.vocab_size - 1)))
            hashes.append(text_hash(text))
    if not names:
        raise UserError(f"source {documents.describe(config)} has no tokens; give files that are not empty")
    return InMemorySource(names, tokens, hashes, tokenizer.vocab_size)


def check(config: SourceConfig, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
    """Raise now what `load` would raise for the settings, for a path that matches no file, and for the first document."""
    if config.kind == "array_record":
        checked_meta(config, tokenizer)
        return
    template = chat.load(tokenizer, chat_template) if config.kind == "chat" else None
    eos_tail(config.append_eos, tokenizer)
    if config.join.tokens is not None:
        # Any one may be left out; whether all are shows when all are read.
        next(iter(_usable(config)))
        return
    name, text = next(documents.read(config))
    if template is not None:
        _encode_chat(template, name, text)


def _load_chats(config: SourceConfig, template: chat.Chat) -> InMemorySource:
    names, tokens, hashes, loss_weights = [], [], [], []
    for name, text in documents.read(config) if config.join.tokens is None else _joined(config, template):
        ids, own = _encode_chat(template, name, text)
        names.append(name)
        tokens.append(ids)
        hashes.append(text_hash(text))
        loss_weights.append(own)
    return InMemorySource(names, tokens, hashes, template.tokenizer.vocab_size, loss_weights)


def _joined(config: SourceConfig, template: chat.Chat) -> Iterator[tuple[str, bytes]]:
    """Long conversations with the names of the first and the last that each was made of; warns of those that are left out."""
    for group in join.join(list(_usable(config)), config.join, lambda messages: len(template.tokens(messages))):
        ends = dict.fromkeys((group[0].name, group[-1].name))
        conversation = {"messages": join.messages(group), "tools": None}
        yield (
            f"{len(group)} from {' to '.join(ends)}",
            json.dumps(conversation, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace"),
        )


def _usable(config: SourceConfig) -> Iterator[join.Usable]:
    """The conversations that can be joined; raises `UserError` if there are none, else warns of what is left out."""
    refused: collections.Counter[str] = collections.Counter()
    seen: set[int] = set()
    for name, text in documents.read(config):
        try:
            found = join.reform(name, **json.loads(text), config=config.join)
            digest = text_hash(json.dumps([found.system, found.turns]).encode())
            if digest in seen:
                raise join.Refused("repeated")
        except join.Refused as error:
            refused[str(error)] += 1
            continue
        seen.add(digest)
        yield found
    reasons = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
    if not seen:
        raise UserError(
            f"source {documents.describe(config)} has no conversation that can be joined ({reasons}); leave out source.join"
        )
    if refused:
        warn(f"source {documents.describe(config)}: of {len(seen) + refused.total()} conversations some are not joined ({reasons})")


def _encode_chat(template: chat.Chat, name: str, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 `[n]` and loss weights float32 `[n]` of the conversation that a reader's `text` holds as JSON."""
    try:
        conversation = json.loads(text)
        ids, own = template.encode(**conversation)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if not own.any() and any(message["role"] == "assistant" for message in conversation["messages"]):
        raise UserError(f"{name}: chat template {template.template.origin} leaves out everything the assistant says; fix it")
    if not own.any():
        raise UserError(f"{name} has nothing for the model to write; add a message with the role 'assistant', or leave it out")
    return ids, own


def split(source: Source, fraction: float, which: Split) -> Subset:
    """The training or the held-out documents; held out are those whose text hash, as a fraction of 2^64, is below `fraction`.

    So the same text is never on both sides, and a document keeps its side when others are added or removed. If a corpus is so
    small that a side would be empty, that side gets the one document with the nearest hash. Raises `UserError` if the requested
    side cannot get a document.
    """
    order = np.argsort(source.hashes, kind="stable")
    held = source.hashes[order] < np.uint64(int(fraction * 2.0**64))
    if fraction > 0 and len(order) > 1:
        # Equal texts have the same hash and stay on one side.
        if not held.any():
            held = source.hashes[order] == source.hashes[order[0]]
        if held.all():
            held = source.hashes[order] != source.hashes[order[-1]]
    ids = np.sort(order[held] if which == "heldout" else order[~held])
    if not len(ids):
        raise UserError(
            f"no document is left for the {which} side of a corpus of {len(order)} documents with "
            f"data.heldout_fraction={fraction}; add documents or change the fraction"
        )
    return Subset(source, ids)


def lengths_between(selection: Subset, low: int, high: int | None) -> Subset:
    """The documents of `low` to `high` tokens; raises `UserError` if there are none."""
    keep = (selection.lengths >= low) & (selection.lengths <= (high if high is not None else np.iinfo(np.int64).max))
    if not keep.any():
        raise UserError(
            f"no document has between {low} and {high} tokens (the longest has {selection.lengths.max()}); "
            "change part.min_tokens or part.max_tokens"
        )
    return Subset(selection.source, selection.ids[keep])
