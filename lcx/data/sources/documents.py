"""Raw documents, one at a time: the readers behind every kind of source.

A reader yields `(name, text)` in an order that depends on the corpus alone; `text` is bytes (UTF-8 unless the file uses
another encoding). A conversation's text is the JSON of its messages and tools, with sorted keys.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.core.files import refuse_lfs_pointer
from lcx.core.manifest import check_file
from lcx.data.config import SourceConfig

_TESTS = {"test", "tests", "idle_test"}
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}


Refuse = Callable[[str, str, str], None]
"""Called with the name of what cannot be read, the reason in a word or two, and a sentence for the user."""


def stop(name: str, reason: str, sentence: str) -> None:
    """The `Refuse` that ends the reading: raises `UserError` with the sentence."""
    raise UserError(sentence)


Part = tuple[int, int]
"""Where a part of a document begins and ends, in bytes."""


def read(config: SourceConfig, refuse: Refuse = stop) -> Iterator[tuple[str, bytes]]:
    """The documents of a source, without empty ones, up to `config.limit_bytes` of text.

    Raises `UserError` if nothing is found. What cannot be read (a file, a line, a row) is passed to `refuse`; unless that raises,
    as it does by default, reading goes on behind it.
    """
    for name, text, _ in read_parts(config, refuse):
        yield name, text


def read_parts(config: SourceConfig, refuse: Refuse = stop) -> Iterator[tuple[str, bytes, tuple[Part, ...]]]:
    """As `read`, with the parts that a document was assembled of (`lcx.data.curation.assemble`), none for others."""
    readers = {"stdlib": _stdlib, "text": _text, "jsonl": _jsonl, "parquet": _parquet, "tfds": _tfds, "chat": _chat}
    if config.kind not in readers:
        raise UserError(f"source.kind={config.kind!r} holds tokens, not text; use one of {', '.join(readers)}")
    taken, refused = 0, False

    def noting(name: str, reason: str, sentence: str) -> None:
        nonlocal refused
        refused = True
        refuse(name, reason, sentence)

    for name, text, *parts in readers[config.kind](config, noting):
        if not text:
            continue
        yield name, text, parts[0] if parts else ()
        taken += len(text)
        if config.limit_bytes is not None and taken >= config.limit_bytes:
            return
    if not taken and not refused:
        raise UserError(f"source {describe(config)} has no text; give files that are not empty")


def describe(config: SourceConfig) -> str:
    """The source in a few words, for messages and plots."""
    return config.kind if config.kind == "stdlib" else f"{config.kind}:{','.join(config.paths)}"


def files(config: SourceConfig) -> list[pathlib.Path]:
    """Files that match the patterns, without duplicates, sorted; raises `UserError` if a pattern matches none."""
    found: set[pathlib.Path] = set()
    for pattern in config.paths:
        matches = [pathlib.Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            folder = pathlib.Path(pattern).expanduser()
            what = (
                f"is a directory; add a pattern, such as {str(folder / '*.txt')!r}"
                if folder.is_dir()
                else ("matches no file; give a path or a glob pattern of existing files")
            )
            raise UserError(f"source.path={pattern!r} {what}")
        found.update(matches)
    return sorted(found)


def _stdlib(config: SourceConfig, refuse: Refuse) -> Iterator[tuple[str, bytes]]:
    """Each top-level module as one document, and each package as one document of its files in path order (like a repository)."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = _FOREIGN if config.include_tests else _FOREIGN | _TESTS
    documents: dict[str, list[pathlib.Path]] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skip)
        for name in sorted(names):
            if name.endswith(".py"):
                path = pathlib.Path(folder, name)
                parts = path.relative_to(root).parts
                documents.setdefault(parts[0] + "/" * (len(parts) > 1), []).append(path)
    if not documents:
        raise UserError(f"the standard library of this Python has no .py files under {root}; use source.kind='text' with a path")
    for name in sorted(documents):
        yield name, b"\n".join(path.read_bytes() for path in sorted(documents[name]))


def _text(config: SourceConfig, refuse: Refuse) -> Iterator[tuple[str, bytes]]:
    for path in files(config):
        try:
            with opened(path) as file:
                text = file.read()
        except UserError as error:
            refuse(str(path), "unreadable_file", str(error))
            continue
        if b"\0" in text:
            refuse(str(path), "zero_bytes", f"{path} is not text (it contains zero bytes); exclude it from source.path")
        else:
            yield str(path), text


def _jsonl(config: SourceConfig, refuse: Refuse) -> Iterator[tuple[str, bytes, tuple[Part, ...]]]:
    for name, row in _rows(config, config.field, "text", refuse):
        if isinstance(row[config.field], str):
            text = row[config.field].encode("utf-8", "surrogatepass")
            yield name, text, _parts(row.get("parts"), len(text))
        else:
            refuse(name, "not_text", f"{name} has {row[config.field]!r:.60} under source.field={config.field!r}; expected text")


def _parts(found: object, size: int) -> tuple[Part, ...]:
    """What assembly wrote under `parts`; other programs may keep something else there."""
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        return ()
    parts = tuple((part.get("start"), part.get("end")) for part in found)
    bounds = [0, *(bound for part in parts for bound in part), size]
    whole = all(isinstance(bound, int) for bound in bounds)
    return parts if whole and bounds == sorted(bounds) else ()


def _chat(config: SourceConfig, refuse: Refuse) -> Iterator[tuple[str, bytes]]:
    # The default is the key of plain text, which never holds a conversation.
    field = "messages" if config.field == "text" else config.field
    for name, row in _rows(config, field, "messages", refuse):
        chat = {"messages": row[field], "tools": row.get("tools")}
        yield name, json.dumps(chat, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")


def _rows(config: SourceConfig, field: str, what: str, refuse: Refuse) -> Iterator[tuple[str, dict]]:
    """The objects of JSONL files, named `file:line`, each with a value under `field`."""
    for path in files(config):
        for number, line in enumerate(_lines(path, refuse), 1):
            if not line.strip():
                continue
            name = f"{path}:{number}"
            try:
                row = json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                refuse(name, "broken_line", _not_json(path, name, error))
                continue
            if not isinstance(row, dict):
                refuse(name, "not_an_object", f"{name} is not a JSON object; expected lines such as {{{field!r}: ...}}")
            elif field not in row:
                refuse(name, "no_field", f"{name} has no {what} under source.field={field!r}{nearest(field, row)}")
            else:
                yield name, row


def _not_json(path: pathlib.Path, name: str, error: Exception) -> str:
    """A sentence about a line that is not JSON, which may be of a file that was never meant to be."""
    why = f"{error.msg} at column {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
    json_file = path.name.lower().removesuffix(".gz").endswith((".json", ".jsonl", ".ndjson"))
    way = "correct the line, or leave it out" if json_file else "if it is plain text, set source.kind='text', or --kind=text"
    return f"{name} is not valid JSON ({why}); {way}"


def _parquet(config: SourceConfig, refuse: Refuse) -> Iterator[tuple[str, bytes]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError("source.kind='parquet' needs pyarrow; install the extra: pip install -e '.[hf]'") from error
    for path in files(config):
        number = 0
        try:
            table = parquet.ParquetFile(path)
            columns = table.schema_arrow.names
            if config.field not in columns:
                raise UserError(f"{path} has no column {config.field!r} (source.field){nearest(config.field, columns)}")
            for piece in table.iter_batches(columns=[config.field]):
                for value in piece.column(0).to_pylist():
                    yield f"{path}:{number}", _as_bytes(value)
                    number += 1
        except UserError as error:
            refuse(str(path), "no_field", str(error))
        except Exception as error:
            refuse(str(path), "unreadable_file", f"{path} cannot be read as a Parquet file: {error}")


def _tfds(config: SourceConfig, refuse: Refuse) -> Iterator[tuple[str, bytes]]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError("source.kind='tfds' needs tensorflow_datasets; install it: pip install tensorflow-datasets") from error
    for name in config.paths:
        try:
            rows = tfds.data_source(name, split=config.split, data_dir=config.data_dir, download=False)
        except Exception as error:
            raise UserError(
                f"tfds dataset {name!r} split {config.split!r} cannot be opened in data_dir={config.data_dir!r} "
                f"(prepare it there first, with file_format='array_record'): {_short(error)}"
            ) from error
        for i in range(len(rows)):
            row = rows[i]
            if config.field not in row:
                raise UserError(f"tfds dataset {name!r} has no feature {config.field!r} (source.field){nearest(config.field, row)}")
            yield f"{name}/{config.split}:{i}", _as_bytes(row[config.field])


def _short(error: Exception) -> str:
    """The first line of a library's error message, shortened to fit into a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _as_bytes(value: object) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def _lines(path: pathlib.Path, refuse: Refuse) -> Iterator[bytes]:
    try:
        with opened(path) as file:
            yield from file
    except UserError as error:
        refuse(str(path), "unreadable_file", str(error))


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file for reading, decompressed if its name ends in .gz; raises `UserError` if it cannot be read, now or in the body."""
    try:
        refuse_lfs_pointer(path)
        check_file(path)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
