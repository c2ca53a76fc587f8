"""A Hugging Face `tokenizer.json`, read by the `tokenizers` library (extra `hf`)."""

from __future__ import annotations

import functools
import hashlib
import pathlib

import numpy as np

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.data.tokenizers.special_tokens import character, files_next_to, with_usual


class HuggingFace:
    """A `tokenizer.json`; special tokens spelled out in a text become their ids, as in the library.

    Raises `UserError` if the file cannot be read or the tokenizers library is missing.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        tokenizers = library("tokenizers", f"tokenizer {str(path)!r}")
        self.path = pathlib.Path(path)
        self.folder = self.path.parent
        raw = self.path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:
            raise UserError(f"tokenizer {str(path)!r} cannot be read as a tokenizer.json: {error}") from error
        # Truncation or padding stored in the file would cut documents silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps; the vocabulary size is set by the largest one.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.specials = with_usual(files_next_to(self.folder).roles, self._tokenizer.token_to_id)
        self.bos_id, self.eos_id = (self._role(role) for role in ("bos_token", "eos_token"))
        self.fingerprint = hashlib.sha256(raw).hexdigest()[:16]

    @property
    def begins_with_bos(self) -> bool:
        """Whether the file's post-processor starts a text with the begin-of-sequence token."""
        first = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        return self.bos_id is not None and first == [self.bos_id]

    def _role(self, role: str) -> int | None:
        return self._tokenizer.token_to_id(self.specials[role]) if role in self.specials else None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids int32 `[n]`, no special tokens added."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 `[n]` and the characters that each covers, int32 `[n, 2]`."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(found.ids, np.int32), np.asarray(found.offsets, np.int32).reshape(-1, 2)

    def decode(self, tokens: np.ndarray) -> str:
        """Text, special tokens left out."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def special(self, token: int) -> str | None:
        """How a special token is spelled, None for any other token."""
        return self._spelled.get(token)

    @functools.cached_property
    def _spelled(self) -> dict[int, str]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {number: entry.content for number, entry in added if entry.special}

    def characters(self, alphabet: str) -> np.ndarray:
        """Id of each character: its entry in the vocabulary, or else its encoding if that is a single token."""
        number, name = self._tokenizer.token_to_id, str(self.path)
        return np.asarray([character(one, number, self.encode(one), name) for one in alphabet], np.int32)
