"""Tokenise a corpus once, into ArrayRecord shards that lcx and TFDS read; if killed, a rerun resumes where it stopped.

The result is a TFDS dataset without a TFDS builder: `tfds.builder_from_directory(folder).as_data_source("train")` gives
features `name` and `tokens` without TensorFlow, and lcx reads the same shards through array_record alone
(`source.kind="array_record"`). `lcx.data.sources.records` describes the layout.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import numpy as np

from lcx.core import manifest
from lcx.core.configs import plain
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.data.config import SourceConfig
from lcx.data.sources import documents, records
from lcx.data.sources.sources import encode, eos_tail, text_hash
from lcx.data.tokenizers import tokenizers


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a preparation, counting committed shards only."""

    shards: int
    documents: int
    tokens: int


def prepare(
    source: SourceConfig,
    tokenizer: str,
    out_dir: str | os.PathLike,
    *,
    name: str = "lcx",
    shard_tokens: int = 1 << 24,
    report: Callable[[Progress], None] | None = None,
) -> Progress:
    """Writes the source's documents, tokenised, to `out_dir` and returns how many there are.

    A shard ends with the document that reaches `shard_tokens`. A shard is written under a temporary name and renamed, then its
    index in the same way, which commits the shard; a rerun verifies by hash that the corpus still starts with the committed
    documents, skips them without tokenising, and ends with the same bytes as an uninterrupted run. `report` is called after every
    shard. Raises `UserError` for an empty corpus, a folder that holds another dataset, a corpus that changed in between, and a
    disk that cannot be written.
    """
    if source.kind == "chat":
        raise UserError("source.kind='chat' is read directly, with its loss weights; name its files in the config instead")
    folder, encoder = pathlib.Path(out_dir).expanduser(), tokenizers.load(tokenizer)
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens} must be above 0")
    identity = {
        "format": 1,
        "name": name,
        "tokenizer": tokenizer,
        "fingerprint": encoder.fingerprint,
        "vocab_size": encoder.vocab_size,
        "dtype": np.min_scalar_type(encoder.vocab_size - 1).name,
        # Conversations, which alone can be joined, are not prepared.
        "source": {key: value for key, value in plain(source).items() if key != "join"},
        "shard_tokens": shard_tokens,
    }
    is_new = not folder.exists()
    try:
        (folder / "index").mkdir(parents=True, exist_ok=True)
        if _claim(folder, identity):
            return _Writer(folder, identity).progress
        writer, tail = _Writer(folder, identity), eos_tail(source.append_eos, encoder)
        for text_name, text, parts, digest in writer.remaining(documents.read_parts(source), encoder):
            tokens = encode(encoder, text, parts, tail)
            if len(tokens):
                writer.add(text_name, tokens, digest)
                if writer.full and writer.commit() and report is not None:
                    report(writer.progress)
        writer.finish()
    except UserError:
        if is_new and not records.index_path(folder, 0).exists():
            shutil.rmtree(folder)
        raise
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}; fix that and rerun the same command, it resumes from there"
        ) from error
    if report is not None:
        report(writer.progress)
    return writer.progress


def _claim(folder: pathlib.Path, identity: dict) -> bool:
    """True if the dataset is complete; otherwise marks the folder as belonging to this dataset."""
    path = folder / records.META
    if path.exists():
        meta = json.loads(path.read_bytes())
        begun = meta["complete"] or records.index_path(folder, 0).exists()
        for key, value in identity.items():
            if begun and meta.get(key) != value and key != "tokenizer":
                raise UserError(
                    f"{folder} holds another dataset ({_difference(key, meta.get(key), value)}); use a new folder or delete it"
                )
        if begun:
            return meta["complete"]
    elif foreign := sorted(entry.name for entry in folder.iterdir() if entry.name != "index"):
        raise UserError(f"{folder} contains {foreign[0]!r}, which is not part of an lcx dataset; use a new folder")
    write_atomically(path, _json({**identity, "complete": False}))
    return False


def _difference(key: str, old: object, new: object) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key, old, new = next((f"{key}.{name}", old.get(name), new[name]) for name in new if old.get(name) != new[name])
    return f"{key} is {old!r}, not {new!r}"


class _Writer:
    """The committed shards of a folder, and the shard being filled."""

    def __init__(self, folder: pathlib.Path, identity: dict) -> None:
        self._folder, self._identity = folder, identity
        self._shard_lengths: list[int] = []
        self._hashes: list[int] = []
        self._tokens = 0
        while (path := records.index_path(folder, len(self._shard_lengths))).exists():
            _, lengths, hashes = records.read_index(path)
            self._count(lengths.tolist(), hashes.tolist())
        self._pending: list[tuple[str, np.ndarray, int]] = []

    @property
    def progress(self) -> Progress:
        return Progress(len(self._shard_lengths), sum(self._shard_lengths), self._tokens)

    @property
    def full(self) -> bool:
        return sum(len(tokens) for _, tokens, _ in self._pending) >= self._identity["shard_tokens"]

    def remaining(
        self, texts: Iterator[tuple[str, bytes, tuple[documents.Part, ...]]], encoder: tokenizers.Tokenizer
    ) -> Iterator[tuple[str, bytes, tuple[documents.Part, ...], int]]:
        """Documents that are not yet in a committed shard, each with its hash."""
        done = collections.deque(self._hashes)
        for name, text, parts in texts:
            digest = text_hash(text)
            if not done:
                yield name, text, parts, digest
            elif digest == done[0]:
                done.popleft()
            elif len(encoder.encode(text)):  # a text without tokens was never written
                raise UserError(f"document {name} has changed since {self._folder} was started; delete the folder and start again")
        if done:
            raise UserError(f"{self._folder} holds more documents than the corpus has now; delete the folder and start again")

    def add(self, name: str, tokens: np.ndarray, digest: int) -> None:
        self._pending.append((name, tokens.astype(self._identity["dtype"]), digest))

    def commit(self) -> bool:
        """Writes the pending documents as the next shard; True if there were any."""
        from array_record.python import array_record_module

        if not self._pending:
            return False
        shard = len(self._shard_lengths)
        path = records.shard_path(self._folder, self._identity["name"], shard)
        partial = path.with_name("writing.partial")
        try:
            writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
            for name, tokens, _ in self._pending:
                writer.write(records.encode_example({"name": name.encode(), "tokens": tokens.tobytes()}))
            writer.close()
        except (RuntimeError, ValueError) as error:
            raise OSError(f"shard {shard}: {error}") from error
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        names, tokens, hashes = zip(*self._pending, strict=True)
        lengths = [len(x) for x in tokens]
        sums = [records.checksum(one) for one in tokens]
        records.write_index(records.index_path(self._folder, shard), names, lengths, hashes, sums)
        self._count(lengths, hashes)
        self._pending = []
        return True

    def finish(self) -> None:
        """The last shard, TFDS's files, the manifest, and the mark of completion, in that order."""
        self.commit()
        if not self._shard_lengths:
            raise UserError(f"{self._folder}: the corpus has no tokens; give files that are not empty")
        paths = [records.shard_path(self._folder, self._identity["name"], shard) for shard in range(len(self._shard_lengths))]
        size = sum(path.stat().st_size for path in paths)
        described = records.tfds_files(self._identity["name"], self._shard_lengths, size, np.dtype(self._identity["dtype"]))
        for name, content in described.items():
            write_atomically(self._folder / name, _json(content))
        progress = dataclasses.asdict(self.progress)
        content = _json({**self._identity, **progress, records.CHECKED: True, "complete": True})
        # Weights of tokens, which may have been computed and deleted, have a manifest of their own.
        names = [*described, *(path.name for path in paths)]
        names += [records.index_path(pathlib.Path(), shard).as_posix() for shard in range(len(paths))]
        manifest.write(self._folder, names, given={records.META: content})
        write_atomically(self._folder / records.META, content)

    def _count(self, lengths: list[int], hashes: list[int]) -> None:
        self._shard_lengths.append(len(lengths))
        self._hashes += hashes
        self._tokens += sum(lengths)


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
