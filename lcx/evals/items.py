"""Questions that took long to compose, kept on the disk: composed once, whatever is evaluated on them.

A file is named after everything that its questions depend on, so that a change of any of it composes them anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lcx.core.files import write_atomically
from lcx.evals.base import Item

WORTH = 2.0
"""Seconds of composing that are worth a file."""


def kept(folder: pathlib.Path | None, named: Sequence[Any], compose: Callable[[], list[Item]]) -> list[Item]:
    """The items of that name from their file in `folder`, or composed; then they get a file if that took more than `WORTH` seconds.

    A file that cannot be read is composed anew.
    """
    if folder is None:
        return compose()
    path = folder / f"{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            pass
    started = time.perf_counter()
    items = compose()
    if time.perf_counter() - started > WORTH and jax.process_index() == 0:
        _write(path, items)
    return items


def _write(path: pathlib.Path, items: Sequence[Item]) -> None:
    fields = ("depth", "text", "references", "turns", "prefix", "units")
    said = json.dumps([{name: getattr(item, name) for name in fields} for item in items]).encode()
    lengths = np.array([[len(item.prompt), len(item.answer)] for item in items], np.int64).reshape(-1, 2)
    tokens = np.concatenate([np.concatenate([item.prompt, item.answer]) for item in items] or [np.zeros(0, np.int32)])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, lengths=lengths, tokens=tokens.astype(np.int32), said=np.frombuffer(said, np.uint8))
    write_atomically(path, buffer.getvalue())


def _read(path: pathlib.Path) -> list[Item]:
    with np.load(path, allow_pickle=False) as held:
        lengths, tokens, said = held["lengths"], held["tokens"], json.loads(held["said"].tobytes())
    items, at = [], 0
    for (prompt, answer), values in zip(lengths.tolist(), said, strict=True):
        values |= {name: tuple(values[name]) for name in ("references", "turns")}
        middle, end = at + prompt, at + prompt + answer
        items.append(Item(tokens[at:middle], tokens[middle:end], **values))
        at = end
    if at != len(tokens):
        raise ValueError(f"{path} holds {len(tokens)} tokens, not {at}")
    return items
