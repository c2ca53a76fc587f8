"""Text to token ids and back: bytes (embedded) or a Hugging Face `tokenizer.json` (extra `hf`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Protocol

import numpy as np

from lcx.core.config import nearest
from lcx.core.errors import UserError


class Tokenizer(Protocol):
    """What the rest of lcx asks of a tokenizer; `fingerprint` changes when any id would."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids int32 `[n]` of `text`, no special tokens added."""

    def decode(self, tokens: np.ndarray) -> str:
        """Text of token ids; special tokens give nothing."""

    def characters(self, alphabet: str) -> np.ndarray:
        """Id of each character written by itself, int32 `[len(alphabet)]`; raises `UserError` where one needs several ids."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One id per UTF-8 byte, then the special tokens that were asked for."""

    bos: bool = False
    eos: bool = False

    @property
    def vocab_size(self) -> int:
        """256 and one for each special token."""
        return 256 + self.bos + self.eos

    @property
    def bos_id(self) -> int | None:
        """256, or None without a begin-of-sequence token."""
        return 256 if self.bos else None

    @property
    def eos_id(self) -> int | None:
        """The id after the begin-of-sequence token's, or None."""
        return 256 + self.bos if self.eos else None

    @property
    def fingerprint(self) -> str:
        """The name itself: it says everything."""
        return "bytes" + "+bos" * self.bos + "+eos" * self.eos

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes as int32."""
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """UTF-8 text; malformed bytes become replacement characters."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def characters(self, alphabet: str) -> np.ndarray:
        """The byte of each character."""
        ids = self.encode(alphabet)
        if len(ids) != len(alphabet):
            raise UserError(f"the alphabet {alphabet!r} holds characters of several bytes; keep to ASCII")
        return ids


class HuggingFace:
    """A `tokenizer.json` read by the `tokenizers` library."""

    def __init__(self, path: str | pathlib.Path) -> None:
        try:
            import tokenizers as library
        except ImportError as error:
            raise UserError(
                f"tokenizer {str(path)!r} needs the tokenizers library; install the extra: pip install -e '.[hf]'"
            ) from error
        self.path = pathlib.Path(path)
        raw = self.path.read_bytes()
        try:
            self._tokenizer = library.Tokenizer.from_buffer(raw)
        except Exception as error:
            raise UserError(f"tokenizer {str(path)!r} is not a tokenizer.json that can be read: {error}") from error
        # Truncation or padding stored in the file would cut documents silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special("bos_token", ("<s>", "<bos>", "<|begin_of_text|>"))
        self.eos_id = self._special("eos_token", ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"))
        self.fingerprint = hashlib.sha256(raw).hexdigest()[:16]

    def _special(self, role: str, usual: tuple[str, ...]) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            beside = self.path.parent / name
            if beside.exists():
                entry: Any = json.loads(beside.read_text()).get(role)
                token = entry.get("content") if isinstance(entry, dict) else entry
                if token is not None and (found := self._tokenizer.token_to_id(token)) is not None:
                    return found
        return next((found for token in usual if (found := self._tokenizer.token_to_id(token)) is not None), None)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids int32 `[n]`, no special tokens added."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Text, special tokens left out."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def characters(self, alphabet: str) -> np.ndarray:
        """Id of each character: its own encoding where that is one token, else its entry in the vocabulary."""
        return np.asarray([self._character(character) for character in alphabet], np.int32)

    def _character(self, character: str) -> int:
        ids = self._tokenizer.encode(character, add_special_tokens=False).ids
        spelled = (character, f"<0x{ord(character):02X}>", {"\n": "Ċ", " ": "Ġ"}.get(character, character))
        found = next((one for form in spelled if (one := self._tokenizer.token_to_id(form)) is not None), None)
        if found is None and len(ids) == 1:
            found = ids[0]
        if found is None:
            raise UserError(f"tokenizer {str(self.path)!r} has no single token for {character!r}, which the retrieval tasks write")
        return int(found)


_BYTES = {tokenizer.fingerprint: tokenizer for tokenizer in (Bytes(), Bytes(True), Bytes(False, True), Bytes(True, True))}


def load(name: str) -> Tokenizer:
    """The tokenizer that `name` says: `bytes` with `+bos` and `+eos` as wanted, or the path of a `tokenizer.json` or its folder.

    Raises `UserError` for an unknown name, a missing or unreadable file, and a missing `tokenizers` library.
    """
    if name in _BYTES:
        return _BYTES[name]
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return HuggingFace(path)
    if path.suffix == ".json" or "/" in name:
        raise UserError(f"tokenizer {name!r} is not there; give the path of a tokenizer.json, or 'bytes'")
    raise UserError(f"tokenizer {name!r} is not known{nearest(name, [*_BYTES, 'path/to/tokenizer.json'])}")
