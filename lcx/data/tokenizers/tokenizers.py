"""Text to token ids and back: bytes (embedded), `tokenizer.json`, SentencePiece models, tiktoken ranks (extra `hf`), GGUF.

Where begin-of-sequence (BOS) and end-of-sequence (EOS) tokens come from:

- `encode` adds none. `add_bos_token`, `add_eos_token` and the post-processor of a `tokenizer.json` have no effect on it.
- Training rows: `source.append_eos` ends each document with EOS, `packing.shared_bos` starts each row with BOS. Both are off
  unless a config sets them; rows of retrieval tasks have neither.
- Chats: the chat template writes all of them (`lcx.data.chat.chat.chat`), and nothing is added to its text.
- Prompts: `prompt` puts BOS in front if `begins_with_bos` says that the model was trained that way. For a `tokenizer.json` that
  is what its post-processor does, as in transformers 5, which then ignores tokenizer_config.json; for a SentencePiece model it is
  `add_bos_token` of tokenizer_config.json, or else true if it has a BOS (as in the code published with Llama, Mistral and Gemma);
  for tiktoken ranks it is `begins_with_bos` of the JSON file next to them, and true for Llama 3's; for bytes it is true if `+bos`
  was requested. Such a model should also train on rows with `packing.shared_bos`.
- Nothing puts EOS after a prompt, so `add_eos_token` has no meaning here.

In ordinary text a `tokenizer.json` turns special tokens that are spelled out (`</s>` in a web page) into their ids, as
transformers does; with the other kinds they stay text. In a chat they become ids with every kind.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.core.files import refuse_lfs_pointer
from lcx.core.gguf import is_gguf
from lcx.core.manifest import check_file
from lcx.data.tokenizers import special_tokens
from lcx.data.tokenizers.gguf_vocab import unpacked
from lcx.data.tokenizers.hugging_face import HuggingFace
from lcx.data.tokenizers.sentence_piece import SentencePiece
from lcx.data.tokenizers.tiktoken_ranks import Ranks, looks_like_ranks


class Tokenizer(Protocol):
    """What lcx needs from a tokenizer; `fingerprint` changes whenever any id would.

    `begins_with_bos`: the model was trained with BOS in front of a text. `specials`: tokens by their role in a chat template
    (`bos_token`, `eos_token`, ...). `folder`: the folder of its files, None for bytes.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    begins_with_bos: bool
    specials: Mapping[str, str]
    folder: pathlib.Path | None
    fingerprint: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids int32 `[n]` of `text`, no special tokens added."""

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 `[n]` of a text with special tokens spelled out, and the characters of each, int32 `[n, 2]`.

        Characters are given as (start, end); tokens that share a character both include it.
        """

    def decode(self, tokens: np.ndarray) -> str:
        """Text of token ids; special tokens are left out."""

    def special(self, token: int) -> str | None:
        """How a special token is spelled, None for any other token."""

    def characters(self, alphabet: str) -> np.ndarray:
        """Id of each single character, int32 `[len(alphabet)]`; raises `UserError` if one needs several ids."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One id per UTF-8 byte, then the requested special tokens; a chat spells them `<s>` and `</s>`."""

    bos: bool = False
    eos: bool = False
    folder = None

    @property
    def vocab_size(self) -> int:
        """256 plus one for each special token."""
        return 256 + self.bos + self.eos

    @property
    def bos_id(self) -> int | None:
        """256, or None without a begin-of-sequence token."""
        return 256 if self.bos else None

    @property
    def eos_id(self) -> int | None:
        """The first id after the bytes and the begin-of-sequence token, or None."""
        return 256 + self.bos if self.eos else None

    @property
    def begins_with_bos(self) -> bool:
        """True if a begin-of-sequence token was requested."""
        return self.bos

    @property
    def specials(self) -> dict[str, str]:
        """The special tokens by role, as a chat template writes them."""
        names = (("bos_token", "<s>", self.bos), ("eos_token", "</s>", self.eos))
        return {role: token for role, token, there in names if there}

    @property
    def fingerprint(self) -> str:
        """The tokenizer's name, which determines it completely."""
        return "bytes" + "+bos" * self.bos + "+eos" * self.eos

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes as int32."""
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and special tokens, int32 `[n]`, and the characters that each covers, int32 `[n, 2]`."""
        number = {token: self.bos_id if role == "bos_token" else self.eos_id for role, token in self.specials.items()}
        ids, covered = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
        for at, piece, special in special_tokens.split(text, number):
            ids.append(np.asarray([number[piece]], np.int32) if special else self.encode(piece))
            lengths = [len(piece)] if special else [1] * len(ids[-1])
            covered.append(special_tokens.places(piece, lengths) + np.int32(at))
        return np.concatenate(ids), np.concatenate(covered)

    def decode(self, tokens: np.ndarray) -> str:
        """UTF-8 text; malformed bytes become replacement characters."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def special(self, token: int) -> str | None:
        """`<s>` or `</s>`, None for a byte."""
        return {self.bos_id: "<s>", self.eos_id: "</s>"}.get(token)

    def characters(self, alphabet: str) -> np.ndarray:
        """The byte of each character."""
        ids = self.encode(alphabet)
        if len(ids) != len(alphabet):
            raise UserError(f"the alphabet {alphabet!r} has characters of several bytes; use ASCII only")
        return ids


_BYTES = {tokenizer.fingerprint: tokenizer for tokenizer in (Bytes(), Bytes(True), Bytes(False, True), Bytes(True, True))}


def load(name: str) -> Tokenizer:
    """The tokenizer called `name`: `bytes`, optionally with `+bos` and `+eos`, or the path of a file or of its folder.

    A file is a `tokenizer.json`, a SentencePiece model or tiktoken ranks; which of them is determined from its content, since Llama
    3's `tokenizer.model` holds ranks. In a folder, `tokenizer.json` is preferred, then `tokenizer.model`, then the only `*.model`
    or `*.tiktoken`. Of a GGUF file it is the tokenizer in it. Raises `UserError` for an unknown name, a missing or unreadable file,
    and a missing library.
    """
    if name in _BYTES:
        return _BYTES[name]
    path = pathlib.Path(name).expanduser()
    if is_gguf(path):
        path = unpacked(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.is_file():
        check_file(path)
        try:
            refuse_lfs_pointer(path)
            with open(path, "rb") as file:
                raw = file.read(4096)
        except OSError as error:
            raise UserError(f"tokenizer {name!r} cannot be read: {error}") from error
        if path.suffix == ".json" or raw.lstrip()[:1] == b"{":
            return HuggingFace(path)
        return Ranks(path) if looks_like_ranks(raw) else SentencePiece(path)
    if path.suffix in (".json", ".model", ".tiktoken") or "/" in name:
        raise UserError(
            f"tokenizer {name!r} does not exist; give the path of a tokenizer.json, a SentencePiece or tiktoken file, or 'bytes'"
        )
    raise UserError(f"unknown tokenizer {name!r}{nearest(name, [*_BYTES, 'path/to/tokenizer.json'])}")


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    found = sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])
    if len(found) != 1:
        names = f"several: {', '.join(path.name for path in found)}" if found else "no tokenizer.json, *.model or *.tiktoken"
        raise UserError(f"tokenizer {str(folder)!r} is a directory with {names}; give the path of the file")
    return found[0]


def prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids int32 `[n]` of a text to be continued, with BOS in front if the model was trained that way."""
    ids = tokenizer.encode(text)
    return np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32) if tokenizer.begins_with_bos else ids
