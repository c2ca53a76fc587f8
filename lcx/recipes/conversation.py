"""A conversation with a model, turn by turn, under its chat template; the keys of what was said stay in the cache.

Each turn is written anew by the template, with all turns before it, so that the model sees what it would see anywhere else; of its
tokens those behind the first that differs from the last time are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lcx.core.errors import UserError
from lcx.data.chat.chat import Chat
from lcx.data.tokenizers.stream import NEIGHBOURS, Stream
from lcx.evals.zero_shot import at_length, check
from lcx.model.architecture import build_architecture, build_schemes
from lcx.model.sampling import GREEDY, Sampling
from lcx.model.session import OnRead, Session
from lcx.positions.registry import settings
from lcx.recipes.generation import Completion, end_ids, opening, refuse_foreign, said, schemes_for
from lcx.training.loading import Loaded


@dataclasses.dataclass(frozen=True)
class Part:
    """A message, or a text that waits for the next question: who it is from, how it begins, and its tokens without a template's."""

    role: str
    text: str
    tokens: int


class Conversation:
    """Questions and answers under a model's chat template, in at most `length` tokens.

    `length` None is what the weights were trained for, times the factor that `positions` names; frequencies are those of that
    length from the first question on. `texts` stand before the first question, after every `reset` too. Each answer draws from a
    seed of its own, the first from `sampling`'s. Raises `UserError` for values that do not fit.
    """

    def __init__(
        self,
        loaded: Loaded,
        chat: Chat,
        *,
        length: int | None = None,
        positions: str = "none",
        system: str | None = None,
        texts: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if "" in stop:
            raise UserError("a stop string is empty; omit it, or give text to stop at")
        model, trained = loaded.run.model, loaded.meta.length
        own = build_schemes(model, loaded.schemes)
        # A slip in them is said before they are asked for a factor.
        at_length(own, check(positions), trained, trained)
        self.length, self.used, self._answers = declared(positions, trained, length), 0, 0
        schemes = schemes_for(model, own, positions, trained, self.length)
        arch, buffers = build_architecture(model, loaded.run.execution, schemes, self.length)
        self._session = Session(loaded.params, buffers, arch, self.length)
        self._chat, self._system, self._first_texts, self._stop = chat, system, tuple(texts), tuple(stop)
        self._sampling, self.max_new_tokens, self._vocab_size = sampling, max_new_tokens, model.vocab_size
        self._end_ids = end_ids(chat.tokenizer, loaded.stop_ids, chat)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, and the texts that were added."""
        self._messages, self._waiting, self.used = opening(self._system), list(self._first_texts), 0

    def add(self, text: str) -> int:
        """Put a text before the next question; returns the number of its tokens."""
        self._waiting.append(text)
        return len(self._chat.tokenizer.encode(text))

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None = None,
        on_read: OnRead | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """The answer to a question, which `ended` by "stop", "eos", "length" or, with what has come by then, "interrupted".

        `on_text` hears of new text as `generation.generate_text` says, `on_read` of the tokens that are in the cache before the
        answer begins. A question that is interrupted before its answer begins is as if it were not asked. Raises `UserError` where
        the conversation leaves no room for an answer; it stays as it was before the question.
        """
        messages = [*self._messages, said("user", "\n\n".join([*self._waiting, question]))]
        tokens = self._chat.prompt(messages)
        refuse_foreign(tokens, self._vocab_size, "the conversation")
        room = self.length - len(tokens)
        if room < 1:
            raise UserError(
                f"with this question the conversation has {len(tokens):,} tokens, which leaves no room for an answer in "
                f"{self.length:,}; begin a new one or a shorter text, or declare a greater length with length=N"
            )
        stream, ended = Stream(self._chat.tokenizer, self._stop, tokens[-NEIGHBOURS:]), "length"

        def give(piece: str) -> None:
            if piece and on_text is not None:
                on_text(piece)

        def on_token(token: int) -> bool:
            give(stream.add(token))
            return stream.stopped

        new = self._session.answer(
            tokens, min(room, self.max_new_tokens), sampling=self._drawn_anew(), stop_ids=self._end_ids,
            on_token=on_token, on_read=on_read, is_stopped=is_stopped,
        )  # fmt: skip
        if not len(new):
            return Completion("", new, "interrupted")
        give(stream.finish())
        if stream.stopped:
            ended = "stop"
        elif new[-1] in self._end_ids:
            ended = "eos"
        elif len(new) < min(room, self.max_new_tokens):
            ended = "interrupted"
        self._messages, self._waiting = [*messages, said("assistant", stream.text)], []
        self.used, self._answers = len(tokens) + len(new), self._answers + 1
        return Completion(stream.text, new, ended)

    def parts(self) -> list[Part]:
        """What the conversation consists of so far, and the texts that wait for the next question."""
        encode = self._chat.tokenizer.encode
        messages = [(str(message["role"]), str(message["content"])) for message in self._messages]
        waiting = [("before the next question", text) for text in self._waiting]
        return [Part(role, text, len(encode(text))) for role, text in (*messages, *waiting)]

    @property
    def cached(self) -> np.ndarray:
        """The tokens whose keys are in the cache, int32 `[n]`."""
        return self._session.tokens

    def _drawn_anew(self) -> Sampling:
        return dataclasses.replace(self._sampling, seed=(self._sampling.seed + self._answers) % 2**32)


def declared(positions: str, trained: int, length: int | None) -> int:
    """For how many tokens the positions of a conversation are made; raises `UserError` where that is not said or does not fit."""
    if length is None:
        factor = 1 if positions.strip() == "none" else settings(positions).get("factor")
        if not isinstance(factor, int | float):
            raise UserError(f"positions={positions!r} names no factor; say with length=N how many tokens the conversation may have")
        length = int(trained * factor)
    if not 2 <= length < 2**31:
        raise UserError(f"length={length:,} must be from 2 to {2**31 - 1:,} tokens")
    return length
