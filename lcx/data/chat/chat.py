"""Conversations to token ids with a loss weight for each token: 1 on what the model writes, 0 elsewhere.

A conversation is a list of messages `{"role": ..., "content": ...}`; messages with the role `assistant` are the model's. The chat
template (jinja2, in the sandbox of `lcx.data.chat.sandbox`) turns them into text, special tokens included; the tokenizer adds none.
What the model writes is the text of the template's `{% generation %}` blocks. Without such blocks it is found by rendering the
conversation twice for each of the model's turns, once up to the prompt that asks for the turn and once up to its end: the
difference is the message and the mark that ends the turn, without the line break that the template puts between turns. If a
template writes a header for the turn but no prompt for it (`add_generation_prompt`), the header counts as the model's.

A token counts as the model's if any of its characters does. This agrees with `return_assistant_tokens_mask` of transformers,
except for a turn that ends in the middle of a character's bytes, of which transformers takes only the first token.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.core.manifest import check_file
from lcx.data.tokenizers.special_tokens import files_next_to
from lcx.data.tokenizers.tokenizers import Tokenizer

_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
OPTION = "data.chat_template"
"""What names a template's file in a config; commands have a flag for it."""

Message = Mapping[str, Any]


class Template:
    """A chat template.

    `text` is jinja2 source, `specials` the tokens that it may refer to by role (`bos_token`, ...), `origin` where it came from and
    `option` what names another, for errors. Raises `UserError` if the template is not valid jinja2 or the library is missing.
    """

    def __init__(self, text: str, specials: Mapping[str, str], origin: str = "given", option: str = OPTION) -> None:
        try:
            from lcx.data.chat import sandbox
        except ImportError as error:
            raise UserError("chat templates need jinja2; install the extra: pip install -e '.[hf]'") from error
        self.origin, self.marks_turns = origin, _BLOCK.search(text) is not None
        self._way_out = f"fix it, or name another template file with {option}"
        self._specials, self._sandbox, self._environment = dict(specials), sandbox, sandbox.Environment()
        try:
            self._program = self._environment.program(text)
        except Exception as error:
            raise UserError(f"chat template {origin} is rejected: {_said(error)}; {self._way_out}") from error

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and (start, end) of each generation block in characters.

        `add_generation_prompt` appends the prompt for the model's turn, if the template has one. Raises `UserError` with the
        template's own message if it rejects the messages, and for everything that templates are not allowed to do.
        """
        _check(messages)
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {**self._specials, "messages": plain, "tools": tools, "documents": None}
        try:
            meter = self._sandbox.Meter(len(plain), self._sandbox.measure([plain, tools], limit=1 << 40))
            return self._environment.render(self._program, meter, {**values, "add_generation_prompt": add_generation_prompt})
        except self._sandbox.Stopped as error:
            raise UserError(f"chat template {self.origin} rejects these messages: {_said(error)}") from error
        except Exception as error:
            raise UserError(f"chat template {self.origin} is rejected: {_said(error)}; {self._way_out}") from error


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer and a chat template."""

    tokenizer: Tokenizer
    template: Template

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 `[n]` and loss weights float32 `[n]` of a conversation; each weight is at the place of its own token.

        Raises `UserError` for what `Template.render` rejects, and for a template without generation blocks that writes a turn
        differently when other turns follow.
        """
        text, written = self.written(messages, tools)
        ids, places = self.tokenizer.encode_chat(text)
        first, last = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
        weights = np.zeros(len(ids), np.float32)
        for start, end in written:
            weights[(first < end) & (last > start)] = 1
        return ids, weights

    def written(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and (start, end) in characters of what the model writes in it; raises what `encode` does."""
        text, written = self.template.render(messages, tools)
        return text, written if self.template.marks_turns else _turns(self.template, messages, tools, text)

    def tokens(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> np.ndarray:
        """Ids int32 `[n]` of a conversation, without asking what in it is the model's."""
        return self.tokenizer.encode_chat(self.template.render(messages, tools)[0])[0]

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> np.ndarray:
        """Ids int32 `[n]` of a conversation for the model to answer, with begin-of-sequence only if the template writes it."""
        return self.tokenizer.encode_chat(self.template.render(messages, tools, add_generation_prompt=True)[0])[0]

    @functools.cached_property
    def end_id(self) -> int | None:
        """The special token that the template ends the model's turn with; None if it uses text or nothing for that."""
        try:
            ids, weights = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except UserError:
            # A template for other conversations; the model's own end tokens have to do.
            return None
        written = ids[weights > 0]
        return int(written[-1]) if len(written) and self.tokenizer.special(int(written[-1])) is not None else None


def load(tokenizer: Tokenizer, path: str | None = None, option: str = OPTION) -> Chat:
    """The tokenizer with the template in the file `path`, or with its own.

    Its own template is `chat_template.jinja` in its folder, or `chat_template` in tokenizer_config.json (the one named `default`
    if there are several). Raises `UserError` if it has none; `option` is what names a file.
    """
    if path is not None:
        return Chat(tokenizer, Template(_text(pathlib.Path(path).expanduser()), tokenizer.specials, path, option))
    if tokenizer.folder is None:
        raise UserError(f"tokenizer {tokenizer.fingerprint!r} has no chat template; name a template file with {option}")
    own = template_in(tokenizer.folder)
    if own is None:
        raise UserError(
            f"{tokenizer.folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            f"name a template file with {option}"
        )
    return Chat(tokenizer, Template(own[0], tokenizer.specials, own[1], option))


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer comes with a chat template of its own."""
    return tokenizer.folder is not None and template_in(tokenizer.folder) is not None


def template_in(folder: pathlib.Path) -> tuple[str, str] | None:
    """The template of a tokenizer's folder and the file that it comes from; None if there is none."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return _text(own), str(own)
    found = files_next_to(folder).values.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return (found, str(folder / "tokenizer_config.json")) if isinstance(found, str) else None


def _text(path: pathlib.Path) -> str:
    check_file(path)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"chat template {path} cannot be read ({why}); give the path of a jinja2 template") from error


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages={messages!r:.60} is not a conversation; expected [{{'role': 'user', 'content': ...}}]")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{i}]={message!r:.60} is not a message; expected {{'role': ..., 'content': ...}}")
        if not isinstance(message.get("role"), str):
            raise UserError(f"messages[{i}] has role={message.get('role')!r:.60}; expected a string such as 'user' or 'assistant'")
        # Tool calls are under other keys; content in several parts is a list.
        if len(message) == 1 or not isinstance(message.get("content"), str | list | None):
            raise UserError(f"messages[{i}] has content={message.get('content')!r:.60}; expected a string")


def _turns(template: Template, messages: Sequence[Message], tools: Any, text: str) -> list[tuple[int, int]]:
    """(start, end) in characters of what the model writes in `text`, from rendering ever longer beginnings of the conversation."""
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise UserError(
                f"messages[0] is the model's, but chat template {template.origin} does not mark where the model's own words begin; "
                "start with another role, or mark them in the template with {% generation %} and {% endgeneration %}"
            )
        asked, _ = template.render(messages[:i], tools, add_generation_prompt=True)
        answered, _ = template.render(messages[: i + 1], tools)
        if not answered.startswith(asked) or not text.startswith(answered):
            late = answered.startswith(asked)
            raise UserError(
                f"chat template {template.origin} writes {'a turn' if late else 'the prompt of a turn'} differently when "
                f"{'others follow' if late else 'it is answered'} (messages[{i}]), so what the model writes cannot be identified; "
                "mark it in the template with {% generation %} and {% endgeneration %}"
            )
        found.append((len(asked), _end(answered, len(asked), message)))
    return found


def _end(answered: str, start: int, message: Message) -> int:
    """Where a turn ends: after the mark that follows the message, before any line breaks and spaces that follow the mark."""
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else ""
    at = answered.rfind(said, start) if said else -1
    behind = answered[at + len(said) :] if at >= 0 else answered[start:]
    return len(answered.rstrip()) if behind.strip() else len(answered)


def _said(error: Exception) -> str:
    """The message of an error, as the end of a sentence."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RecursionError):
        words = "it recurses without end"
    line = getattr(error, "lineno", None)
    return (f"line {line}: {words}" if line else words)[:300].removesuffix(".")
