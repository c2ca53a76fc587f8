"""OOLONG (Bertsch et al., 2511.02817): questions about a whole context, counted over its lines (synth) or episodes (real)."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping

from lcx.evals.readers import final_answers
from lcx.evals.readers.files import Files, Question, Row
from lcx.evals.text.formats import Sample

NEW_TOKENS = 256
MOST = 400
"""Rows that are drawn from each file: files hold gigabytes of contexts, several questions about each."""


def synth(row: Row) -> Question:
    """`context_window_text`, `question` with the form of the answer, `answer` as a Python list of one element, `answer_type`."""
    text = row["answer"]
    if found := re.fullmatch(r"\[datetime\.date\((\d+), (\d+), (\d+)\)\]", text):
        answer = "{:04d}-{:02d}-{:02d}".format(*map(int, found.groups()))
    else:
        answer = str(ast.literal_eval(text)[0])
    return _asked(row, answer, functools.partial(final_answers.counted_up, references=(answer,), kind=row["answer_type"]))


def real(row: Row) -> Question:
    r"""`context_window_text`, `question`, which asks for a \boxed{} answer, and `answer`: a number, a word, or a list."""
    return _asked(row, str(row["answer"]), functools.partial(final_answers.boxed, references=(str(row["answer"]),)))


def _asked(row: Row, answer: str, score) -> Question:
    prompt = f"{row['context_window_text']}\n{row['question']}"
    return Question(Sample(prompt, "", (answer,)), NEW_TOKENS, score)


PARTS: Mapping[str, Files] = {
    "synth": Files(("data/test-*.parquet", "**/test-*.parquet"), synth, most=MOST),
    "synth_validation": Files(("data/validation-*.parquet", "**/validation-*.parquet"), synth, most=MOST),
    "real": Files(("dnd/test.jsonl", "**/dnd/test.jsonl"), real, most=MOST),
    "real_validation": Files(("dnd/validation.jsonl", "**/dnd/validation.jsonl"), real, most=MOST),
}
