"""Reads what `lcx data prepare` wrote: lengths and hashes at once, tokens document by document on demand."""

from __future__ import annotations

import collections
import json
import pathlib

import numpy as np

from lcx.core import manifest
from lcx.core.errors import UserError
from lcx.core.manifest import DamagedError
from lcx.data.config import SourceConfig
from lcx.data.sources import records, token_weights
from lcx.data.tokenizers.tokenizers import Tokenizer

_KEEP_DOCUMENTS = 64

WHOLE = 1 << 30
"""Bytes of a dataset up to which its shards are read through when it is opened; a larger one is checked document by document."""


class Prepared:
    """A source over ArrayRecord shards; keeps the last few documents in memory, since long ones are read in pieces.

    `shards` lists each shard's documents. Its tokens have the loss weights that lie next to them, unless `weighted` is False.
    """

    def __init__(self, folder: pathlib.Path, meta: dict, weighted: bool = True) -> None:
        from array_record.python import array_record_data_source

        indexes = [records.read_index(records.index_path(folder, shard)) for shard in range(meta["shards"])]
        self.names = [name for names, _, _ in indexes for name in names]
        by_shard = [lengths for _, lengths, _ in indexes]
        self.lengths = np.concatenate(by_shard)
        ends = np.cumsum([len(lengths) for lengths in by_shard]).tolist()
        self.shards = [list(range(end - len(lengths), end)) for end, lengths in zip(ends, by_shard, strict=True)]
        self._weights = token_weights.find(folder, by_shard) if weighted else None
        self.weighted = self._weights is not None
        self.hashes = np.concatenate([hashes for _, _, hashes in indexes])
        sums = [records.read_sums(records.index_path(folder, shard)) for shard in range(meta["shards"])]
        self._sums = None if any(one is None for one in sums) else np.concatenate(sums)
        self._folder = folder
        self._dtype = np.dtype(meta["dtype"])
        paths = [str(records.shard_path(folder, meta["name"], shard)) for shard in range(meta["shards"])]
        try:
            self._records = array_record_data_source.ArrayRecordDataSource(paths)
        except (RuntimeError, ValueError, OSError) as error:
            raise DamagedError(
                f"a shard of the dataset in {folder} is not what was written ({' '.join(str(error).split())[:160]}); put back a "
                "whole copy of the dataset, or delete it and prepare it again"
            ) from error
        self._kept: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        if len(self._records) != len(self.lengths):
            raise UserError(
                f"{folder} holds {len(self._records)} documents and its index {len(self.lengths)}; delete it and prepare it again"
            )

    def gather(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Tokens int32 of the spans, one after the other."""
        spans = zip(documents.tolist(), starts.tolist(), ends.tolist(), strict=True)
        pieces = [self._document(document)[start:end] for document, start, end in spans]
        return np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, np.int32)

    def loss_weights(self, documents: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Loss weights float32 of the spans' tokens, each at the place of its own token."""
        assert self._weights is not None
        return self._weights.gather(documents, starts, ends)

    def _document(self, document: int) -> np.ndarray:
        tokens = self._kept.pop(document, None)
        if tokens is None:
            tokens = self._read(document)
        self._kept[document] = tokens
        if len(self._kept) > _KEEP_DOCUMENTS:
            self._kept.popitem(last=False)
        return tokens

    def _read(self, document: int) -> np.ndarray:
        """A document's tokens from its file; raises `DamagedError` if they are not those that were written."""
        try:
            tokens = np.frombuffer(records.decode_example(self._records[document])["tokens"], self._dtype)
        except (RuntimeError, ValueError, KeyError, IndexError, StopIteration) as error:
            raise self._damaged(document) from error
        if self._sums is not None and records.checksum(tokens) != int(self._sums[document]):
            raise self._damaged(document)
        return tokens

    def _damaged(self, document: int) -> DamagedError:
        return DamagedError(
            f"document {self.names[document]!r} in {self._folder} is not what was written; put back a whole copy of the dataset, "
            "or delete it and prepare it again"
        )


def open_prepared(config: SourceConfig, tokenizer: Tokenizer, weighted: bool = True) -> Prepared:
    """The dataset in the single folder that `config.path` names; raises `UserError` like `checked_meta`, for loss weights (of which
    there are none if not `weighted`) that are unfinished, and for files that are not as the dataset's manifests say."""
    folder, meta = checked_meta(config, tokenizer)
    if meta.get(records.CHECKED):
        check_files(folder, meta)
    return Prepared(folder, meta, weighted)


def check_files(folder: pathlib.Path, meta: dict) -> None:
    """Raises `DamagedError` for a file that is not as the manifest says; of the shards of a dataset above `WHOLE` sizes count."""
    found = manifest.read(folder / manifest.NAME)
    for name in found.files:
        found.check(name, least=found.bytes > WHOLE and name.startswith(f"{meta['name']}-train."))


def checked_meta(config: SourceConfig, tokenizer: Tokenizer) -> tuple[pathlib.Path, dict]:
    """The single folder that `config.path` names and what its metadata say; neither its index nor its tokens are read.

    Raises `UserError` if it is missing, unfinished, or was made with another tokenizer or without the requested end tokens.
    """
    if len(config.paths) != 1:
        raise UserError(f"source.path={config.paths} names {len(config.paths)} prepared datasets; give one folder per part")
    folder = pathlib.Path(config.paths[0]).expanduser()
    manifest.check_file(folder / records.META)
    try:
        meta = json.loads((folder / records.META).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"source.path={str(folder)!r} holds no prepared dataset; create one with: lcx data prepare") from error
    if not meta["complete"]:
        raise UserError(f"the dataset in {str(folder)!r} is unfinished; rerun the same lcx data prepare, it resumes from there")
    if meta["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"the dataset in {str(folder)!r} was made with tokenizer {meta['tokenizer']!r} ({meta['fingerprint']}), but "
            f"data.tokenizer is another one ({tokenizer.fingerprint}); use the same one or prepare it again"
        )
    if config.append_eos and not meta["source"]["append_eos"]:
        raise UserError(f"the dataset in {str(folder)!r} was made without source.append_eos; prepare it again, or set it to False")
    return folder, meta
