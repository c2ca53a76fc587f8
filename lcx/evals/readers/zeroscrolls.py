"""ZeroSCROLLS (Shaham et al., 2305.14196), validation split: the answers of its test split are not public."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Placed, Question, Row, laid_out
from lcx.evals.text.formats import Sample

_QA = "Answer the question from the text, in as few words as possible, without any explanation."
TASKS: dict[str, tuple[Callable[..., float], int, str]] = {
    "gov_report": (scores.rouge_mean, 1024, "Summarise the report on one page."),
    "summ_screen_fd": (scores.rouge_mean, 512, "Summarise the episode whose script this is, in one paragraph."),
    "qmsum": (scores.rouge_mean, 512, "Answer the question about the meeting in a few sentences."),
    "squality": (scores.rouge_mean, 512, "Answer the question about the story in one paragraph."),
    "qasper": (scores.folded_f1, 128, f'{_QA} Write "yes", "no" or "unanswerable" where that is the answer.'),
    "narrative_qa": (scores.folded_f1, 64, _QA),
    "musique": (scores.folded_f1, 32, f'{_QA} Write "unanswerable" where the text does not tell.'),
    "quality": (scores.first_choice, 10, "Which option is right by the text? Answer with its letter alone."),
    "space_digest": (scores.near_percentage, 36, "What percentage of the reviews is positive? Answer with a percentage alone."),
    "book_sum_sort": (
        scores.concordance_of_permutation, 256,
        "The summaries of a book's chapters are shuffled. Write their numbers in the right order, separated by commas.",
    ),
}  # fmt: skip
"""The score of each task, the tokens of an answer, and what is asked."""


def joined(rows: Iterable[Placed]) -> Iterator[Placed]:
    """Rows of one `id`, which differ in their `output`, become one row with all `outputs`."""
    first: dict[str, tuple[str, dict]] = {}
    for place, row in rows:
        with laid_out(place, row):
            _, made = first.setdefault(row["id"], (place, {**row, "outputs": []}))
            made["outputs"].append(row["output"])
    yield from first.values()


def question(task: str, row: Row) -> Question:
    """A row: `input`, and where in it the document and the query stand, in characters; a task without queries has empty ones."""
    score, new_tokens, told = TASKS[task]
    document, query = (
        row["input"][row[f"{part}_start_index"] : row[f"{part}_end_index"]].strip() for part in ("document", "query")
    )
    if not document or not all(isinstance(output, str) and output for output in row["outputs"]):
        raise ValueError("no document, or no answer, as in the test split")
    prompt = "\n\n".join(part for part in (told, document, query, told) if part)
    answers = tuple(row["outputs"])
    wanted = tuple(part.strip() for part in answers[0].split(",")) if task == "book_sum_sort" else answers
    return Question(Sample(prompt, "\nAnswer:", answers), new_tokens, functools.partial(score, references=wanted))


PARTS: Mapping[str, Files] = {
    task: Files(
        (f"{task}/validation.jsonl", f"**/{task}/validation.jsonl"),
        functools.partial(question, task),
        joined,
        needs="rouge_score" if score is scores.rouge_mean else None,
    )
    for task, (score, _, _) in TASKS.items()
}
