"""A model's answers on the disk, so that none is asked for twice and a killed run has not paid in vain."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from lcx.core.errors import UserError
from lcx.core.files import write_atomically


def key_of(text: str) -> str:
    """What a text is known by."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Answers:
    """A JSONL file of answers by key, which grows as they come; `known` has them all. An answer is whatever JSON can hold.

    Raises `UserError` for a file that cannot be read or holds something else.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise UserError(f"answers cannot be kept in {path} ({error.strerror}); name another file as cache") from error
        # Not `splitlines`, which cuts at separators that JSON leaves inside of strings.
        self.known: dict[str, Any] = dict(row for line in text.split("\n") if (row := self._row(line)) is not None)

    def _row(self, line: str) -> tuple[str, Any] | None:
        try:
            row = json.loads(line)
        except ValueError:
            return None  # the last line of a killed run may be torn
        if not isinstance(row, dict) or not {"key", "answer"} <= row.keys():
            raise UserError(f"{self._path} holds something else than answers; name another file as cache")
        return row["key"], row["answer"]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Take answers for the time of the body."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8") as self._file:
            self._file.write("\n" if torn else "")
            yield

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, on the disk too, before anything else happens."""
        self.known[key] = answer
        self._file.write(self._line(key))
        self._file.flush()

    def rewrite(self) -> None:
        """Write the file in order of the keys, so that its bytes do not depend on who answered first."""
        content = "".join(map(self._line, sorted(self.known))).encode()
        if self.known and (not self._path.exists() or self._path.read_bytes() != content):
            write_atomically(self._path, content)

    def _line(self, key: str) -> str:
        return json.dumps({"key": key, "answer": self.known[key]}, ensure_ascii=False) + "\n"
