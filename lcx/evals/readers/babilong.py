"""BABILong (Kuratov et al., 2406.10149)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Question, Row
from lcx.evals.text.formats import Sample

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = {
    **{f"qa{i}": ROOMS for i in (1, 2, 3, 4)},
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}


def babilong(task: str, row: Row) -> Question:
    """A row: `input` (the context), `question` and `target` (labels, separated by commas)."""
    answers = (row["target"],)
    prompt = (
        "The context holds facts among sentences that do not matter. Use the facts alone to answer the question with one word.\n"
        f"<context>\n{row['input']}\n</context>\nQuestion: {row['question']}"
    )
    scored = functools.partial(scores.only_label, references=answers, labels=LABELS[task], question=row["question"])
    return Question(Sample(prompt, "\nAnswer:", answers), 20, scored)


PARTS: Mapping[str, Files] = {
    task: Files((f"{task}/*.json", f"{task}*.json*"), functools.partial(babilong, task)) for task in LABELS
}
