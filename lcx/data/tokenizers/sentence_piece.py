"""A SentencePiece model (`tokenizer.model`, `*.model`), read by the `sentencepiece` library (extra `hf`)."""

from __future__ import annotations

import functools
import hashlib
import pathlib

import numpy as np

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.data.tokenizers.special_tokens import character, files_next_to, read_json, split, with_usual


class SentencePiece:
    """A SentencePiece model and the tokens added to it (`added_tokens.json`, tokenizer_config.json).

    In ordinary text a special token that is spelled out stays text; in a chat it becomes its id, and what follows it gets no dummy
    space in front (with `legacy: true` in tokenizer_config.json it does, as in transformers). Raises `UserError` if the file
    cannot be read or sentencepiece is missing.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        sentencepiece = library("sentencepiece", f"tokenizer {str(path)!r}")
        self.path = pathlib.Path(path)
        self.folder = self.path.parent
        self._raw = self.path.read_bytes()
        try:
            if not self._raw:
                raise RuntimeError("it is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._raw)
        except RuntimeError as error:
            raise UserError(
                f"tokenizer {str(path)!r} is neither a SentencePiece model nor a file of tiktoken ranks; "
                "use the file that came with the model"
            ) from error
        size = self._model.vocab_size()
        near = files_next_to(self.folder)
        added = {**read_json(self.folder / "added_tokens.json"), **near.added_tokens()}
        self._added = {token: int(number) for token, number in added.items() if int(number) >= size}
        control = (number for number in range(size) if self._model.is_control(number))
        self._special = {**{self._model.id_to_piece(number): number for number in control}, **self._added}
        self.vocab_size = max([size - 1, *self._added.values()]) + 1
        roles = dict(near.roles)
        for role, number in (("bos_token", self._model.bos_id()), ("eos_token", self._model.eos_id())):
            if role not in roles and number >= 0:
                roles[role] = self._model.id_to_piece(number)
        self.specials = with_usual(roles, self._id)
        self.bos_id, self.eos_id = (self._id(self.specials.get(role)) for role in ("bos_token", "eos_token"))
        self.begins_with_bos = self.bos_id is not None and near.flag("add_bos_token", True)
        self._legacy = near.flag("legacy", False)
        extra = repr(sorted(self._added.items())).encode() if self._added else b""
        self.fingerprint = hashlib.sha256(self._raw + extra).hexdigest()[:16]

    def _id(self, token: str | None) -> int | None:
        if token in self._added:
            return self._added[token]
        number = self._model.piece_to_id(token) if token is not None else self._model.unk_id()
        known = number != self._model.unk_id() or token == self._model.id_to_piece(number)
        return number if token is not None and known else None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids int32 `[n]`, no special tokens added."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return np.asarray(self._model.encode(text), np.int32)

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 `[n]` and the characters that each covers, int32 `[n, 2]`."""
        ids: list[int] = []
        covered: list[tuple[int, int]] = []
        for at, piece, special in split(text, self._special):
            if special:
                ids.append(self._special[piece])
                covered.append((at, at + len(piece)))
                continue
            model = self._model if at == 0 or self._legacy else self._without_prefix
            found = model.encode_as_offset_mapping(piece)
            ids += found["ids"]
            covered += [(at + start, at + end) for start, end in found["offsets"]]
        return np.asarray(ids, np.int32), np.asarray(covered, np.int32).reshape(-1, 2)

    @functools.cached_property
    def _without_prefix(self):
        """The same model without its dummy space at the beginning of a text."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        content = sentencepiece_model_pb2.ModelProto.FromString(self._raw)
        content.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=content.SerializeToString())

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without special tokens."""
        special = {*self._special.values()}
        return self._model.decode([t for t in map(int, tokens) if t not in special and 0 <= t < self._model.vocab_size()])

    def special(self, token: int) -> str | None:
        """How a special token is spelled, None for any other token."""
        return self._spelled.get(token)

    @functools.cached_property
    def _spelled(self) -> dict[int, str]:
        return {number: token for token, number in self._special.items()}

    def characters(self, alphabet: str) -> np.ndarray:
        """Id of each character: its entry in the vocabulary, or else its encoding if that is a single token."""
        name = str(self.path)
        return np.asarray([character(one, self._id, self.encode(one), name) for one in alphabet], np.int32)
