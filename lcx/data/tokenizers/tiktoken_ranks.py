"""tiktoken ranks from a local file (`*.tiktoken`, Llama 3's `tokenizer.model`), read by the `tiktoken` library (extra `hf`).

The file has a line `<token in base64> <rank>` per token. It contains neither the regular expression that splits a text nor the
special tokens. They are read from a JSON file next to it, named after it (`o200k.tiktoken.json` for `o200k.tiktoken`):

    {"pattern": "...", "special_tokens": {"<|endoftext|>": 199999}, "bos_token": null, "eos_token": "<|endoftext|>",
     "begins_with_bos": false}

Only `pattern` is required. A file of 128,000 ranks without such a JSON file is Llama 3's: its pattern and 256 special tokens are as
published in https://github.com/meta-llama/llama-models (models/llama3/tokenizer.py).
"""

from __future__ import annotations

import base64
import hashlib
import pathlib
import re
from typing import Any

import numpy as np

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.data.tokenizers.special_tokens import places, read_json, split

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)\s*")
# The library's regex engine runs out of stack on longer runs; Llama 3's own code cuts them at the same length.
_LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")

_LLAMA3_RANKS = 128_000
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMED = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id", "step_id",
    "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag",
)  # fmt: skip
_FIELDS = ("pattern", "special_tokens", "bos_token", "eos_token", "begins_with_bos")


def looks_like_ranks(raw: bytes) -> bool:
    """Whether a file's content starts with a line of ranks."""
    line = raw[:4096].split(b"\n", 1)[0]
    return _LINE.fullmatch(line) is not None


class Ranks:
    """tiktoken ranks with their pattern and special tokens; in ordinary text a special token that is spelled out stays text.

    Raises `UserError` if the file cannot be read, the pattern is unknown, or tiktoken is missing.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        tiktoken = library("tiktoken", f"tokenizer {str(path)!r}")
        self.path = pathlib.Path(path)
        self.folder = self.path.parent
        raw = self.path.read_bytes()
        ranks = _parse(self.path, raw)
        form = _form(self.path, ranks)
        self._special: dict[str, int] = form["special_tokens"]
        try:
            self._encoding = tiktoken.Encoding(
                self.path.name, pat_str=form["pattern"], mergeable_ranks=ranks, special_tokens=self._special
            )
        except ValueError as error:
            raise UserError(f"{self.path}.json has a pattern that is not a regular expression: {error}") from error
        self.vocab_size = self._encoding.n_vocab
        self.specials = {role: form[role] for role in ("bos_token", "eos_token") if form[role] is not None}
        self.bos_id, self.eos_id = (self._special.get(form[role]) for role in ("bos_token", "eos_token"))
        self.begins_with_bos = form["begins_with_bos"]
        self.fingerprint = hashlib.sha256(raw + repr((form["pattern"], sorted(self._special.items()))).encode()).hexdigest()[:16]
        self._ids = {*ranks.values()}

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids int32 `[n]`, no special tokens added."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return np.asarray(self._ordinary(text), np.int32)

    def _ordinary(self, text: str) -> list[int]:
        cuts = [0, *(run.end() for run in _LONG_RUN.finditer(text)), len(text)]
        return [id for a, b in zip(cuts[:-1], cuts[1:], strict=True) for id in self._encoding.encode_ordinary(text[a:b])]

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 `[n]` and the characters that each covers, int32 `[n, 2]`."""
        ids: list[int] = []
        covered = [np.zeros((0, 2), np.int32)]
        for at, piece, special in split(text, self._special):
            found = [self._special[piece]] if special else self._ordinary(piece)
            ids += found
            lengths = map(len, self._encoding.decode_tokens_bytes(found))
            covered.append(places(piece, lengths) + np.int32(at))
        return np.asarray(ids, np.int32), np.concatenate(covered)

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without special tokens; malformed UTF-8 becomes replacement characters."""
        return self._encoding.decode([token for token in map(int, tokens) if token in self._ids])

    def special(self, token: int) -> str | None:
        """How a special token is spelled, None for any other token."""
        return next((spelled for spelled, number in self._special.items() if number == token), None)

    def characters(self, alphabet: str) -> np.ndarray:
        """Id of each character."""
        ids = [self._ordinary(one) for one in alphabet]
        for one, found in zip(alphabet, ids, strict=True):
            if len(found) != 1:
                raise UserError(f"tokenizer {str(self.path)!r} has no single token for {one!r}, which the retrieval tasks need")
        return np.asarray(ids, np.int32).reshape(-1)


def _parse(path: pathlib.Path, raw: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(found[1], validate=True) if found else None
        except ValueError:
            token = None
        if not token:
            raise UserError(f"{path}:{number} is not a base64 token and its rank; the file is damaged, download it again")
        ranks[token] = int(found[2])
    if len({*ranks.values()}) < len(ranks) or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"the {len(ranks)} ranks of {path} are not 0 to {len(ranks) - 1}; the file is damaged, download it again")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"{path} has no token for the byte 0x{missing:02X}, so some texts cannot be tokenised; download it again")
    return ranks


def _form(path: pathlib.Path, ranks: dict[bytes, int]) -> dict[str, Any]:
    """The pattern and special tokens, from the JSON file next to the ranks, or Llama 3's."""
    description = path.with_name(path.name + ".json")
    given = read_json(description)
    form = {"special_tokens": {}, "bos_token": None, "eos_token": None, "begins_with_bos": False, **given}
    if not given and len(ranks) == _LLAMA3_RANKS:
        count = 256 - len(_LLAMA3_NAMED)
        names = (*_LLAMA3_NAMED, *(f"reserved_special_token_{2 + i}" for i in range(count)))
        special = {f"<|{name}|>": _LLAMA3_RANKS + i for i, name in enumerate(names)}
        bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
        return {"pattern": _LLAMA3_PATTERN, "special_tokens": special, "bos_token": bos, "eos_token": eos, "begins_with_bos": True}
    if not given:
        raise UserError(
            f"{path} has {len(ranks):,} ranks, not Llama 3's 128,000, so its pattern and special tokens are unknown; "
            f"write them to {description.name} next to it, for example "
            '{"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}, "eos_token": "<|endoftext|>"}'
        )
    for name in given:
        if name not in _FIELDS:
            raise UserError(f"{description} has no field {name!r}{nearest(name, _FIELDS)}")
    special = form["special_tokens"]
    if not isinstance(form.get("pattern"), str):
        raise UserError(f"{description} has no pattern; add the regular expression that splits a text before tokens are merged")
    if not isinstance(special, dict) or any(type(id) is not int or id < len(ranks) for id in special.values()):
        raise UserError(f"{description}: special_tokens must map tokens to ids of at least {len(ranks)}, the number of ranks")
    if len({*special.values()}) < len(special):
        raise UserError(f"{description} gives two special_tokens the same id; each needs its own")
    for role in ("bos_token", "eos_token"):
        if form[role] is not None and form[role] not in special:
            raise UserError(
                f"{description} has {role}={form[role]!r}, which is not one of its special_tokens{nearest(form[role], special)}"
            )
    if type(form["begins_with_bos"]) is not bool or (form["begins_with_bos"] and form["bos_token"] is None):
        raise UserError(
            f"{description} has begins_with_bos={form['begins_with_bos']!r}; it must be true or false, and true needs bos_token"
        )
    return form
