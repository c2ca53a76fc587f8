"""The answers of evaluations, written one by one as they come, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lcx.core import processes
from lcx.core.console import warn
from lcx.core.errors import UserError


class AnswerLog:
    """A file of JSON lines, one answer a line; without a path nothing is kept. A line that a kill cut off is dropped.

    `label` names the evaluation that adds answers.
    """

    def __init__(self, path: pathlib.Path | None, label: str = "") -> None:
        self._path, self._label, self._known = path, label, {}
        self.heard: Callable[[int], None] = lambda count: None
        """Is called with the number of answers that this object has added, whenever there is one more."""
        self.added = 0
        if path is not None:
            processes.meet("answers")  # the first process has written all that the others know
        if path is None or not path.exists():
            return
        text = path.read_text("utf-8")
        whole, _, cut_off = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number} is damaged; delete it, and what it held is asked for again") from error
        if cut_off and jax.process_index() == 0:
            warn(f"{path} ends in the middle of an answer, which is asked for again")
            os.truncate(path, len(text.encode()) - len(cut_off.encode()))

    @property
    def items_folder(self) -> pathlib.Path | None:
        """Where questions that took long to compose are kept; None without a path."""
        return None if self._path is None else self._path.parent / "items"

    def known(self, key: str) -> Mapping[str, Any] | None:
        """The answer with that key, if it has been given."""
        return self._known.get(key)

    def add(self, key: str, **values: Any) -> None:
        """Keep an answer; it is on the disk when this returns. Raises `UserError` if it cannot be written."""
        self._known[key] = {"key": key, "label": self._label, **values}
        self.added += 1
        self.heard(self.added)
        if self._path is None or jax.process_index() != 0:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self._known[key]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror}); free space and rerun the same command") from error


def key_of(*parts: Any, tokens: np.ndarray) -> str:
    """Sixteen hex digits that change with any of the parts and with the tokens of a prompt."""
    named = hashlib.sha256(json.dumps(parts).encode())
    named.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    return named.hexdigest()[:16]
