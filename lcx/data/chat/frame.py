"""What a chat template writes around the turns of a conversation, as tokens, for rows whose words are put together in tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lcx.core.errors import UserError
from lcx.data.chat.chat import Chat
from lcx.data.synthetic.questions import Frame, Run


def chat_frame(chat: Chat) -> Frame:
    """Questions as turns of a user, answers as turns of the model; what the model itself writes behind them counts as written.

    Raises `UserError` if the template does not write messages as they are, once each and in their order.
    """

    @functools.cache
    def frame(questions: int) -> Sequence[Sequence[Run]]:
        # Characters of the private use area, which no template looks for.
        marks = [f"\ue000{i}\ue001" for i in range(2 * questions)]
        roles = ("user", "assistant")
        text, written = chat.written([{"role": roles[i % 2], "content": mark} for i, mark in enumerate(marks)])
        places = [text.find(mark) for mark in marks]
        if -1 in places or places != sorted(places) or any(text.count(mark) != 1 for mark in marks):
            raise UserError(
                f"chat template {chat.template.origin} does not write every message once and in order, so questions cannot be set "
                "into it; set questions.prompt_format=base, or name another template with data.chat_template"
            )
        runs, at = [], 0
        for i, (mark, place) in enumerate(zip(marks, places, strict=True)):
            runs.append(_runs(chat, text, at, place, written if i and i % 2 == 0 else ()))
            at = place + len(mark)
        return [*runs, _runs(chat, text, at, len(text), written)]

    return frame


def _runs(chat: Chat, text: str, start: int, end: int, written: Sequence[tuple[int, int]]) -> list[Run]:
    """The text between two messages; behind one of the model's, up to where its turn ends, it is written."""
    cut = max((stop for first, stop in written if first <= start <= stop), default=start)
    parts = ((text[start:cut], True), (text[cut:end], False))
    return [Run(chat.tokenizer.encode_chat(part)[0], is_written) for part, is_written in parts if part]
