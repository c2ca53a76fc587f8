"""L-Eval (An et al., 2307.11088): its closed tasks, and its open ones as far as they are scored by n-grams."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from lcx.evals.readers import final_answers, scores
from lcx.evals.readers.files import Files, Placed, Question, Row, laid_out
from lcx.evals.text.formats import Sample

_CHOICE = "Read the text and answer the question about it. Exactly one option is right: write its letter alone."
CLOSED: dict[str, tuple[Callable[..., float], int, str]] = {
    "tpo": (final_answers.one_option, 64, _CHOICE),
    "quality": (final_answers.one_option, 64, _CHOICE),
    "coursera": (
        final_answers.options, 64,
        "Read the text and answer the question about it. One or several options are right: write their letters alone, as in AB.",
    ),
    "gsm100": (
        final_answers.solved_number, 512,
        'Solve the last problem as the ones before it are solved. End with "The answer is" and the number.',
    ),
    "codeU": (
        final_answers.code_output, 512,
        'Below are many functions. Say what the lines after them give, and end with "the final output" and that.',
    ),
    "sci_fi": (
        final_answers.judged_twice, 64,
        "Read the story. Say whether the statement holds in the story, and in brackets whether it holds in our world, in the form "
        "True [fact: False]",
    ),
    "topic_retrieval_longchat": (
        final_answers.exam_match, 64,
        "Below is a conversation over many topics. You will be asked to name one of them, word for word.",
    ),
}  # fmt: skip
"""The score of each closed task, the tokens of an answer, and what is asked."""
OPEN = (
    "financial_qa", "gov_report_summ", "legal_contract_qa", "meeting_summ", "multidoc_qa", "narrative_qa", "natural_question",
    "news_summ", "paper_assistant", "patent_summ", "review_summ", "scientific_qa", "tv_show_summ",
)  # fmt: skip
SUMMARIES = ("gov_report_summ", "meeting_summ", "news_summ", "paper_assistant", "patent_summ", "review_summ", "tv_show_summ")
_BY_MEASURE = {"f1": scores.token_f1, "rouge": scores.rouge_mean, "exam": final_answers.exam_match}


def instructions(rows: Iterable[Placed]) -> Iterator[Placed]:
    """A row of a document (`input`, `instructions`, `outputs`, `evaluation`) becomes one for each instruction.

    Left out are those that only people or a model judge.
    """
    for place, row in rows:
        with laid_out(place, row):
            pairs = list(zip(row["instructions"], row["outputs"], strict=True))
            judged = row["evaluation"] not in _BY_MEASURE
        for number, (instruction, output) in enumerate(pairs if not judged else (), 1):
            yield f"{place}, instruction {number}", {**row, "instruction": instruction, "output": output}


def closed(name: str, row: Row) -> Question:
    """A question of an exam with one right answer."""
    score, new_tokens, told = CLOSED[name]
    prompt, answer = f"{told}\n\n{row['input']}\n\n{row['instruction']}", (str(row["output"]),)
    # Solutions go on as the solved ones do.
    prefix = "\n" if name == "gsm100" else "\nAnswer:"
    return Question(Sample(prompt, prefix, answer), new_tokens, functools.partial(score, references=answer))


def opened(row: Row) -> Question:
    """A question or a task that is answered at length; as in the benchmark, the prompt says how many words are expected."""
    answer = (str(row["output"]),)
    prompt = (
        f"Read the document and follow the instruction after it.\n\n{row['input']}\n\nInstruction: {row['instruction']}\n"
        f"Write about {len(answer[0].split())} words."
    )
    score = _BY_MEASURE[row["evaluation"]]
    return Question(Sample(prompt, "\nAnswer:", answer), 512, functools.partial(score, references=answer))


PARTS: Mapping[str, Files] = {
    name: Files(
        (f"{name}.jsonl", f"**/{name}.jsonl"),
        functools.partial(closed, name) if name in CLOSED else opened,
        instructions,
        needs="rouge_score" if name in SUMMARIES else None,
    )
    for name in (*CLOSED, *OPEN)
}
