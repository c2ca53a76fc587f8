"""What writes: a model as synthesis sees it. `data` knows no model, so the caller of `curate` passes in what builds one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from lcx.data.curation.synthesize.settings import GeneratorConfig

BYTES_PER_TOKEN = 4
"""By which tokens are estimated where a server does not count them."""
_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_REFUSAL = re.compile(
    r"\W*(?:i['’]?m sorry,? but i|i am sorry,? but i|sorry,? (?:but )?i can|as an ai\b"
    r"|i (?:cannot|can['’]?t|am unable to|['’]m unable to) (?:help|assist|provide|rewrite|rephrase|comply|answer)\b)",
    re.IGNORECASE,
)


class Answer(NamedTuple):
    """What a model wrote, and how that `ended`: "stop", "length" (the limit), "too_long" (the request is), or a server's own word.

    Tokens are None where nobody has counted them.
    """

    text: str
    ended: str = "stop"
    input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def words(self) -> str:
        """The answer without the thoughts in front of it and the white space around it."""
        return _THOUGHTS.sub("", self.text, count=1).strip()

    @property
    def fault(self) -> str | None:
        """Why no method can use it, None if one may."""
        if self.ended == "too_long":
            return "request_too_long"
        if self.ended == "length":
            return "cut_off"
        if self.ended == "content_filter" or _REFUSAL.match(self.words):
            return "refused"
        return None if self.words else "empty"


class Generator(Protocol):
    """Requests to answers.

    `fingerprint` changes with whatever changes an answer: the model, the temperature, the limit. Answers to `batch_size` requests
    in a row come from one batch, and are the same again only if all of it is asked again.
    """

    fingerprint: str
    batch_size: int

    def __call__(self, requests: Sequence[str]) -> Iterator[dict[int, Answer]]:
        """The answers by number of the request, as they come; raises `UserError` for a model that does not answer."""
        ...


GeneratorFactory = Callable[[GeneratorConfig], Generator]
"""Builds the generator; raises `UserError` for a model that cannot be had."""


def to_plain(answer: Answer) -> dict[str, Any]:
    """The answer as JSON can hold it; what is no valid text is replaced."""
    return {**answer._asdict(), "text": answer.text.encode("utf-8", "replace").decode()}


def tokens(request: str, answer: Answer) -> tuple[int, int, bool]:
    """Tokens of request and answer, and whether they are estimated from their bytes."""
    if answer.input_tokens is not None and answer.output_tokens is not None:
        return answer.input_tokens, answer.output_tokens, False
    sizes = (len(text.encode("utf-8", "replace")) for text in (request, answer.text))
    sent, written = (-(-size // BYTES_PER_TOKEN) for size in sizes)
    return sent, written, True
