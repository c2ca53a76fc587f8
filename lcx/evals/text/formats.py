"""The two formats of a prompt: text for a base model to continue, or a turn of a chat for an instruct model to answer."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple, Protocol

import numpy as np

from lcx.data.chat import chat
from lcx.data.tokenizers import tokenizers
from lcx.data.tokenizers.tokenizers import Tokenizer


class Sample(NamedTuple):
    """A question in words.

    `prompt` is what is asked, `prefix` the words that the answer begins with, `references` what the answer is looked through for,
    and `depth` where it stands, from 0 (start of the context) to 1 (its end), or None if it stands in several places. `turns` are
    what a user and the model, by turns, have said before.
    """

    prompt: str
    prefix: str
    references: tuple[str, ...]
    depth: float | None = None
    turns: tuple[str, ...] = ()


class PromptFormat(Protocol):
    """How a sample becomes the text that a model reads, and that text tokens."""

    @property
    def name(self) -> str:
        """What `evals.questions.prompt_format` calls it."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        ...

    def text(self, sample: Sample) -> str:
        """All that the model reads before its own first word."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Its tokens, int32 `[n]`, begin-of-sequence included where the model was trained with it."""
        ...


@dataclasses.dataclass(frozen=True)
class BasePrompt:
    """Text that a base model continues: prompt and prefix, one after the other."""

    tokenizer: Tokenizer
    name = "base"

    def text(self, sample: Sample) -> str:
        """Prompt and prefix; a session is written out as a dialogue of User and Assistant."""
        if not sample.turns:
            return sample.prompt + sample.prefix
        said = [f"{role}: {text}" for role, text in zip(itertools.cycle(("User", "Assistant")), sample.turns, strict=False)]
        return "\n".join((*said, f"User: {sample.prompt}", f"Assistant:{sample.prefix}"))

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `data.tokenizers.tokenizers.prompt`."""
        return tokenizers.prompt(self.tokenizer, text)


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A turn of a chat: the prompt is the user's, and the model's answer begins with the prefix, after the template's header."""

    chat: chat.Chat
    name = "chat"

    @property
    def tokenizer(self) -> Tokenizer:
        """The chat's."""
        return self.chat.tokenizer

    def text(self, sample: Sample) -> str:
        """The conversation as the template writes it, then the prefix."""
        roles = zip(itertools.cycle(("user", "assistant")), (*sample.turns, sample.prompt), strict=False)
        asked, _ = self.chat.template.render([{"role": role, "content": text} for role, text in roles], add_generation_prompt=True)
        return asked + sample.prefix.lstrip()

    def encode(self, text: str) -> np.ndarray:
        """The tokens, special ones as the template spells them, and none besides."""
        return self.chat.tokenizer.encode_chat(text)[0]


def choose(name: str, tokenizer: Tokenizer, template: str | None) -> PromptFormat:
    """The format that `evals.questions.prompt_format` names; "auto" is "chat" where there is a chat template.

    Raises `UserError` if there is no template for "chat", or it cannot be used.
    """
    if name == "base" or (name == "auto" and template is None and not chat.has_template(tokenizer)):
        return BasePrompt(tokenizer)
    return ChatPrompt(chat.load(tokenizer, template))
