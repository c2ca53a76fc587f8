"""BAMBOO (Dong et al., 2309.13345), at 4K and 16K; its completion of private code, which is scored by running it, is left out."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Question, Row
from lcx.evals.text.formats import Sample

_CLAIM = (
    "Does the paper support the statement? Answer Yes if it follows from the paper, and No if it contradicts it or goes beyond it."
)
_SPEAKER = "Who says the last line of the dialogue? Write one of the names that occur in it, and nothing else."
_CHOICE = "Read the text and answer the question about it with the letter of the right option, A, B, C or D, alone."
_SORT = 'Write their numbers in the original order, the first one first, as in "[2] > [0] > [1] > [4] > [3]", and nothing else.'


def altqa(row: Row) -> Question:
    """`content` holds instruction, documents and question; `answer` is a number."""
    return _asked(f"{row['content']}\n\nAnswer with a number and nothing else.", (row["answer"],), scores.same_text)


def choice(row: Row) -> Question:
    """`content`, `question`, `options` with their letters, and the letter of the `answer`."""
    listed = "\n".join(row["options"])
    prompt = f"{_CHOICE}\n\n{row['content']}\n\nQuestion: {row['question']}\n{listed}"
    return _asked(prompt, (row["answer"],), scores.initial_choice)


def speaker(row: Row) -> Question:
    """`content` ends before the name of the last line's speaker, the `answer`."""
    return _asked(f"{_SPEAKER}\n\n{row['content']}\n\n{_SPEAKER}", (row["answer"],), scores.of_first_line(scores.same_text))


def claim(row: Row) -> Question:
    """`content`, a `hypothesis` about it, and as `answer` whether it holds."""
    if not isinstance(row["answer"], bool):
        raise TypeError(f"answer {row['answer']!r} is neither true nor false")
    prompt = f"{_CLAIM}\n\n{row['content']}\n\nStatement: {row['hypothesis']}"
    return _asked(prompt, ("Yes" if row["answer"] else "No",), scores.yes_or_no)


def sorted_parts(row: Row) -> Question:
    """`answer` is the original order of the parts: of `content` if it is a list, else of `summaries` of it."""
    whole = isinstance(row["content"], str)
    parts = row["summaries"] if whole else row["content"]
    listed = "\n".join(f"[{number}] {part}" for number, part in enumerate(parts))
    told = f"Below are {len(parts)} {'events of the text' if whole else 'parts of a text'}, shuffled. {_SORT}"
    prompt = "\n\n".join(([row["content"]] if whole else []) + [told, listed, _SORT])
    return _asked(prompt, tuple(map(str, row["answer"])), scores.concordance)


def _asked(prompt: str, references: tuple[str, ...], score) -> Question:
    return Question(Sample(prompt, "\nAnswer:", references), 32, functools.partial(score, references=references))


_QUESTIONS = {
    "altqa": altqa, "meetingqa": choice, "paperqa": choice, "meetingpred": speaker, "showspred": speaker, "senhallu": claim,
    "abshallu": claim, "reportsumsort": sorted_parts, "showssort": sorted_parts,
}  # fmt: skip
PARTS: Mapping[str, Files] = {
    f"{task}_{size}": Files(
        (f"{task}_{size}.jsonl", f"**/{task}_{size}.jsonl"), asked, overall=scores.yes_metrics if asked is claim else None
    )
    for task, asked in _QUESTIONS.items()
    for size in ("4k", "16k")
}
