"""InfiniteBench (Zhang et al., 2402.13718)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Question, Row
from lcx.evals.text.formats import Sample

INFINITEBENCH: dict[str, tuple[Callable[..., float], int]] = {
    "passkey": (scores.first_number, 6),
    "number_string": (scores.first_number, 12),
    "kv_retrieval": (scores.word_among, 50),
    "longbook_qa_eng": (scores.token_f1, 40),
    "longbook_choice_eng": (scores.leading_choice, 40),
    "longbook_sum_eng": (scores.rouge_l_sum, 1200),
    "longdialogue_qa_eng": (scores.name_among, 40),
    "code_debug": (scores.leading_choice, 5),
    "code_run": (scores.last_word, 5),
    "math_find": (scores.first_number, 3),
}
"""The score of each dataset, and the tokens of an answer."""


def infinitebench(name: str, row: Row) -> Question:
    """A row: `context`, `input`, `answer` (one or several), and `options` where one is to be chosen."""
    score, new_tokens = INFINITEBENCH[name]
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    references, options = tuple(map(str, answers)), row.get("options") or []
    listed = ""
    if options:
        listed = "\n" + "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=False))
        letter = "ABCD"[options.index(references[0])]
        references = (letter, *references)
    prompt = f"{row['context']}\n\n{row['input']}{listed}"
    return Question(Sample(prompt, "\nAnswer:", references), new_tokens, functools.partial(score, references=references))


PARTS: Mapping[str, Files] = {
    name: Files(
        (f"{name}.jsonl", f"**/{name}.jsonl"),
        functools.partial(infinitebench, name),
        needs="rouge_score" if score is scores.rouge_l_sum else None,
    )
    for name, (score, _) in INFINITEBENCH.items()
}
