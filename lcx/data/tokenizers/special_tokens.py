"""Special tokens: which ones a tokenizer has, what the files next to it say about them, and where they occur in a text.

Files next to it: `tokenizer_config.json` and `special_tokens_map.json` as transformers writes them. All may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.core.manifest import check_file

USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}
"""Usual names of the token of each role, for when no file names it."""


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The files next to a tokenizer: `values` of tokenizer_config.json, and `roles` (`bos_token`, ...) with their tokens.

    A role of None is one that the files declare to have no token.
    """

    values: dict[str, Any]
    roles: dict[str, str | None]

    def flag(self, name: str, default: bool) -> bool:
        """A boolean of tokenizer_config.json; null counts as missing."""
        value = self.values.get(name)
        return default if value is None else bool(value)

    def added_tokens(self) -> dict[str, int]:
        """Tokens that were added to the vocabulary: `added_tokens_decoder` of tokenizer_config.json."""
        added = self.values.get("added_tokens_decoder") or {}
        return {entry["content"]: int(number) for number, entry in added.items()}


def files_next_to(folder: pathlib.Path) -> TokenizerFiles:
    """The files next to a tokenizer in `folder`; raises `UserError` if one is not a JSON object."""
    values, mapped = read_json(folder / "tokenizer_config.json"), read_json(folder / "special_tokens_map.json")
    roles = {}
    for role, entry in {**mapped, **values}.items():
        token = entry.get("content") if isinstance(entry, dict) else entry
        if role.endswith("_token") and isinstance(token, str | None):
            roles[role] = token
    return TokenizerFiles(values, roles)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, empty if the file is missing; raises `UserError` for anything else."""
    check_file(path)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; use the file that came with the tokenizer")
    return content


def with_usual(roles: dict[str, str | None], number: Callable[[str], int | None]) -> dict[str, str]:
    """The `roles` whose tokens have an id (`number`), plus begin and end of sequence under a usual name that has one."""
    known = {role: token for role, token in roles.items() if token is not None and number(token) is not None}
    for role, names in USUAL.items():
        found = next((name for name in names if number(name) is not None), None)
        if role not in known and found is not None and roles.get(role, found) is not None:
            known[role] = found
    return known


def character(one: str, number: Callable[[str], int | None], ids: Iterable[int], tokenizer: str) -> int:
    """Id of a single character: its entry in the vocabulary, or else its encoding `ids` if that is a single token."""
    spelled = (one, f"<0x{ord(one):02X}>", {"\n": "Ċ", " ": "Ġ"}.get(one, one), {" ": "▁"}.get(one, one))
    found = next((entry for form in spelled if (entry := number(form)) is not None), None)
    ids = list(ids)
    if found is None and len(ids) == 1:
        found = ids[0]
    if found is None:
        raise UserError(f"tokenizer {tokenizer!r} has no single token for {one!r}, which the retrieval tasks need")
    return int(found)


def split(text: str, tokens: Iterable[str]) -> Iterator[tuple[int, str, bool]]:
    """(start, piece, whether it is one of `tokens`) of a text cut at the special tokens spelled out in it, longest first."""
    names = sorted(filter(None, tokens), key=len, reverse=True)
    at = 0
    for found in re.finditer("|".join(map(re.escape, names)), text) if names else ():
        if found.start() > at:
            yield at, text[at : found.start()], False
        yield found.start(), found[0], True
        at = found.end()
    if at < len(text):
        yield at, text[at:], False


def places(text: str, lengths: Iterable[int]) -> np.ndarray:
    """First character and end, int32 `[n, 2]`, of tokens that hold consecutive runs of `lengths` bytes of `text`.

    A token that holds part of a character counts as holding the character.
    """
    raw = np.frombuffer(text.encode(), np.uint8)
    of_byte = np.cumsum((raw & 0xC0) != 0x80) - 1
    ends = np.cumsum(np.fromiter(lengths, np.int64))
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return np.stack([of_byte[starts], of_byte[ends - 1] + 1], axis=1).astype(np.int32)
