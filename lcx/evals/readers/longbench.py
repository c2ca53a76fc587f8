"""LongBench (Bai et al., 2308.14508), all of its English and Chinese datasets, and LongBench v2 (2412.15204)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lcx.evals.readers import scores
from lcx.evals.readers.files import Files, Question, Row
from lcx.evals.text.formats import Sample


class Dataset(NamedTuple):
    """A dataset's score, the tokens of an answer, and what is asked; `needs`: a library of the extra `suites`."""

    score: Callable[..., float]
    new_tokens: int
    told: str
    needs: str | None = None


_QA, _SUMMARY = "Answer the question from the text, in as few words as possible.", "Write a summary of the text."
_SHORT_ZH = "请根据文本回答问题，答案越短越好。"
LONGBENCH: dict[str, Dataset] = {
    "narrativeqa": Dataset(scores.token_f1, 128, _QA),
    "qasper": Dataset(scores.token_f1, 128, _QA),
    "multifieldqa_en": Dataset(scores.token_f1, 64, _QA),
    "multifieldqa_zh": Dataset(scores.chinese_f1, 64, _SHORT_ZH, "jieba"),
    "hotpotqa": Dataset(scores.token_f1, 32, _QA),
    "2wikimqa": Dataset(scores.token_f1, 32, _QA),
    "musique": Dataset(scores.token_f1, 32, _QA),
    "dureader": Dataset(scores.chinese_rouge_l, 128, "请阅读下面的资料，然后用几句话回答问题。", "jieba"),
    "gov_report": Dataset(scores.rouge_l, 512, _SUMMARY),
    "qmsum": Dataset(scores.rouge_l, 512, "Answer the question about the meeting in a few sentences."),
    "multi_news": Dataset(scores.rouge_l, 512, _SUMMARY),
    "vcsum": Dataset(scores.chinese_rouge_l, 512, "请用一段话概括这次会议的内容。", "jieba"),
    "trec": Dataset(scores.classification, 64, "Say what type the question is of, as in the examples."),
    "triviaqa": Dataset(scores.token_f1, 32, _QA),
    "samsum": Dataset(scores.rouge_l, 128, "Summarise the dialogue in a few short sentences, as in the examples."),
    "lsht": Dataset(scores.classification, 64, "请仿照例子，写出新闻所属的类别。"),
    "passage_count": Dataset(scores.share_of_numbers, 32, "How many different passages are there? Answer with the number alone."),
    "passage_retrieval_en": Dataset(
        scores.share_of_numbers, 32, "Which paragraph is the summary of? Answer with its number, as in Paragraph 1."
    ),
    "passage_retrieval_zh": Dataset(scores.share_of_numbers, 32, "下面的摘要写的是哪一段？请写出段落的编号，例如：段落1。"),
    "lcc": Dataset(scores.code_similarity, 64, "Complete the code by its next line."),
    "repobench-p": Dataset(scores.code_similarity, 64, "Complete the code by its next line."),
}
FEW_SHOT, CODE = ("trec", "triviaqa", "samsum", "lsht"), ("lcc", "repobench-p")
"""Datasets that the benchmark does not put into a chat template; of an answer to the first kind only its first line is scored."""
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


def longbench(name: str, row: Row) -> Question:
    """A row of a dataset: `context`, `input` (empty for a summary), `answers`, and `all_classes` where there are any."""
    dataset, answers = LONGBENCH[name], tuple(row["answers"])
    score = dataset.score
    if dataset.score is scores.classification:
        score = functools.partial(scores.classification, classes=tuple(row["all_classes"] or ()))
    if name in FEW_SHOT:
        score = scores.of_first_line(score)
    # Code goes on where it stops.
    told = dataset.told
    prompt = (
        f"{row['context']}{row['input']}" if name in CODE else f"{told}\n\n{row['context']}\n\n{told}\n\n{row['input']}".rstrip()
    )
    prefix = "" if name in FEW_SHOT + CODE else "\n回答：" if name in CHINESE else "\nAnswer:"
    scored = functools.partial(score, references=answers)
    return Question(Sample(prompt, prefix, answers), dataset.new_tokens, scored, name in FEW_SHOT + CODE)


def longbench_v2(row: Row) -> Question:
    """A row of `data.json`: `context`, `question`, four choices and the letter of the right one."""
    options = "\n".join(f"({letter}) {row[f'choice_{letter}']}" for letter in "ABCD")
    prompt = (
        f"Read the text and answer the question about it.\n\n{row['context']}\n\nQuestion: {row['question']}\n{options}\n\n"
        'Write your answer in the form "The correct answer is (letter)".'
    )
    answer = (row["answer"],)
    return Question(Sample(prompt, "", answer), 128, functools.partial(scores.choice_of_four, references=answer))


PARTS: Mapping[str, Files] = {
    name: Files((f"{name}.jsonl", f"**/{name}.jsonl"), functools.partial(longbench, name), needs=dataset.needs)
    for name, dataset in LONGBENCH.items()
}
PARTS_V2: Mapping[str, Files] = {"all": Files(("data.json",), longbench_v2)}
