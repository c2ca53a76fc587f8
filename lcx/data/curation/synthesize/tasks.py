"""Rows of the tasks that mixtures generate, as conversations or texts that can be read, prepared and mixed like any others."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lcx.core.errors import UserError
from lcx.data.config import QUESTIONS
from lcx.data.curation.rows import row
from lcx.data.curation.synthesize.settings import TaskSettings
from lcx.data.synthetic.questions import QuestionTask, Run
from lcx.data.tasks.base import Haystack
from lcx.data.tasks.table import make_task
from lcx.data.tokenizers.stream import UNFINISHED, pieces
from lcx.data.tokenizers.tokenizers import Tokenizer


class Stretch(NamedTuple):
    """A part of a row's text that is, or is not, an answer."""

    text: str
    is_answer: bool


def written(
    settings: TaskSettings, tokenizer: Tokenizer, haystack: Haystack, name: str, count: int, seed: int
) -> Iterator[tuple[bytes, int]]:
    """`count` lines of JSONL, each with the bytes of its text; every one depends on its number, the name and the seed alone.

    Raises `UserError` for rows that a task does not fit into, and for text that is shorter than a row.
    """
    if settings.kind == QUESTIONS:
        task = QuestionTask(settings.questions, tokenizer, _bare if settings.form == "chat" else None)
        if haystack.num_tokens > settings.length:
            task.check(settings.length, haystack)
    else:
        task = make_task(settings.kind, settings.retrieval, tokenizer)
    uniforms = task.uniforms(settings.length)
    for number in range(count):
        drawn = np.random.default_rng((seed, zlib.crc32(name.encode()), number)).random((1, uniforms))
        rows = task.rows(drawn, settings.length, haystack)
        kind = rows.skills[0] if isinstance(task, QuestionTask) else settings.kind
        stretches = _stretches(tokenizer, rows.tokens[0], rows.answers[0])
        yield _line(settings, name, number, kind, stretches)


def _bare(questions: int) -> Sequence[Sequence[Run]]:
    """A frame of nothing around questions and answers: turns of a conversation get theirs from a chat template."""
    return [[]] * (2 * questions + 1)


def _stretches(tokenizer: Tokenizer, tokens: np.ndarray, answers: np.ndarray) -> list[Stretch]:
    """The text of a row, of which the answers are told apart."""
    shown = zip(answers.tolist(), pieces(tokenizer, tokens), strict=True)
    found = [
        Stretch("".join(text for _, text in some), is_answer) for is_answer, some in itertools.groupby(shown, lambda one: one[0])
    ]
    # The window into the text may begin within a character.
    return [Stretch(found[0].text.lstrip(UNFINISHED), found[0].is_answer), *found[1:]]


def _line(settings: TaskSettings, name: str, number: int, kind: str, stretches: list[Stretch]) -> tuple[bytes, int]:
    about: dict[str, Any] = {"task": kind, "tokens": settings.length + 1}
    own = f"{name}:{number}"
    if settings.form == "text":
        text, places = b"", []
        for stretch in stretches:
            start, text = len(text), text + stretch.text.encode("utf-8", "replace")
            if stretch.is_answer:
                places.append([start, len(text)])
        return row(name, own, text, **about, answers=places), len(text)
    while stretches and not stretches[-1].is_answer:
        stretches = stretches[:-1]
    if not stretches or stretches[0].is_answer:
        raise UserError(f"row {number} of task.kind={settings.kind!r} has no question; use longer rows")
    roles = {False: "user", True: "assistant"}
    messages = [{"role": roles[stretch.is_answer], "content": stretch.text} for stretch in stretches]
    size = sum(len(stretch.text.encode("utf-8", "replace")) for stretch in stretches)
    line = json.dumps({"name": own, "source": name, "bytes": size, **about, "messages": messages}, ensure_ascii=False)
    return (line + "\n").encode("utf-8", "replace"), size
