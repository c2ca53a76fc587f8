"""The benchmarks that are read from files: LongBench, InfiniteBench, BABILong, MRCR and Graphwalks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

from lcx.evals.readers import scores
from lcx.evals.readers.files import Benchmark, Files, Question, Row
from lcx.evals.text.formats import Sample

Score = Callable[..., float]


def _first_line(score: Score) -> Score:
    return lambda prediction, *rest: score(prediction.lstrip("\n").split("\n")[0], *rest)


# ---- LongBench (Bai et al., 2308.14508): the dataset's score, tokens of an answer, and what is asked.
_QA, _SUMMARY = "Answer the question from the text, in as few words as possible.", "Write a summary of the text."
LONGBENCH: dict[str, tuple[Score, int, str]] = {
    "narrativeqa": (scores.token_f1, 128, _QA),
    "qasper": (scores.token_f1, 128, _QA),
    "multifieldqa_en": (scores.token_f1, 64, _QA),
    "hotpotqa": (scores.token_f1, 32, _QA),
    "2wikimqa": (scores.token_f1, 32, _QA),
    "musique": (scores.token_f1, 32, _QA),
    "gov_report": (scores.rouge_l, 512, _SUMMARY),
    "qmsum": (scores.rouge_l, 512, "Answer the question about the meeting in a few sentences."),
    "multi_news": (scores.rouge_l, 512, _SUMMARY),
    "trec": (scores.classification, 64, "Say what type the question is of, as in the examples."),
    "triviaqa": (scores.token_f1, 32, _QA),
    "samsum": (scores.rouge_l, 128, "Summarise the dialogue in a few short sentences, as in the examples."),
    "passage_count": (scores.share_of_numbers, 32, "How many different passages are there? Answer with the number alone."),
    "passage_retrieval_en": (
        scores.share_of_numbers, 32, "Which paragraph is the summary of? Answer with its number, as in Paragraph 1.",
    ),
    "lcc": (scores.code_similarity, 64, "Complete the code by its next line."),
    "repobench-p": (scores.code_similarity, 64, "Complete the code by its next line."),
    "multifieldqa_zh": (scores.chinese_f1, 64, _QA),
}  # fmt: skip
PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Datasets that the benchmark does not put into a chat template; the first three have only their first line scored."""


def _longbench(dataset: str, row: Row) -> Question:
    score, new_tokens, told = LONGBENCH[dataset]
    answers = tuple(row["answers"])
    if dataset in PLAIN[:3]:
        score = _first_line(score)
    if dataset == "trec":
        score = _first_line(functools.partial(scores.classification, classes=tuple(row["all_classes"] or ())))
    # Code goes on where it stops.
    prompt = (
        f"{row['context']}{row['input']}" if dataset in PLAIN[3:] else f"{told}\n\n{row['context']}\n\n{told}\n\n{row['input']}"
    )
    prefix = "" if dataset in PLAIN else "\nAnswer:"
    return Question(Sample(prompt, prefix, answers), new_tokens, lambda prediction: score(prediction, answers), dataset in PLAIN)


# ---- LongBench v2 (Bai et al., 2412.15204)
def _longbench_v2(row: Row) -> Question:
    options = "\n".join(f"({letter}) {row[f'choice_{letter}']}" for letter in "ABCD")
    prompt = (
        f"Read the text and answer the question about it.\n\n{row['context']}\n\nQuestion: {row['question']}\n{options}\n\n"
        'Write your answer in the form "The correct answer is (letter)".'
    )
    answer = (row["answer"],)
    return Question(Sample(prompt, "", answer), 128, functools.partial(scores.choice_of_four, references=answer))


# ---- InfiniteBench (Zhang et al., 2402.13718)
INFINITEBENCH: dict[str, tuple[Score, int]] = {
    "passkey": (scores.first_number, 6),
    "number_string": (scores.first_number, 12),
    "kv_retrieval": (scores.word_among, 50),
    "longbook_qa_eng": (scores.token_f1, 40),
    "longbook_choice_eng": (scores.leading_choice, 40),
    "longbook_sum_eng": (scores.rouge_l, 1200),
    "longdialogue_qa_eng": (scores.name_among, 40),
    "code_debug": (scores.leading_choice, 5),
    "code_run": (scores.last_word, 5),
    "math_find": (scores.first_number, 3),
}


def _infinitebench(dataset: str, row: Row) -> Question:
    score, new_tokens = INFINITEBENCH[dataset]
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    references, options = tuple(map(str, answers)), row.get("options") or []
    listed = ""
    if options:
        listed = "\n" + "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=False))
        letter = "ABCD"[options.index(references[0])]
        references = (letter, *references)
    prompt = f"{row['context']}\n\n{row['input']}{listed}"
    return Question(Sample(prompt, "\nAnswer:", references), new_tokens, functools.partial(score, references=references))


# ---- BABILong (Kuratov et al., 2406.10149)
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
BABILONG_LABELS = {
    **{f"qa{i}": ROOMS for i in (1, 2, 3, 4)},
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}


def _babilong(task: str, row: Row) -> Question:
    answers = (row["target"],)
    prompt = (
        "The context holds facts among sentences that do not matter. Use the facts alone to answer the question with one word.\n"
        f"<context>\n{row['input']}\n</context>\nQuestion: {row['question']}"
    )
    labels, question = BABILONG_LABELS[task], row["question"]
    scored = functools.partial(scores.only_label, references=answers, labels=labels, question=question)
    return Question(Sample(prompt, "\nAnswer:", answers), 20, scored)


# ---- MRCR and Graphwalks (OpenAI, 2025)
def _mrcr(row: Row) -> Question:
    messages = json.loads(row["prompt"]) if isinstance(row["prompt"], str) else row["prompt"]
    references = (row["random_string_to_prepend"], row["answer"])
    *before, last = [message["content"] for message in messages]
    # As long as the answer, which no tokenizer needs more tokens for than it has bytes.
    new_tokens = 64 + len(row["answer"]) // 2
    scored = functools.partial(scores.repeated_turn, references=references)
    return Question(Sample(last, "", references, turns=tuple(before)), new_tokens, scored)


def _graphwalks(row: Row) -> Question:
    nodes = tuple(row["answer_nodes"])
    scored = functools.partial(scores.final_list_f1, references=nodes)
    return Question(Sample(row["prompt"], "", nodes), 256 + 16 * len(nodes), scored)


def _named(names: Sequence[str], question: Callable[[str, Row], Question]) -> dict[str, Files]:
    return {name: Files((f"{name}.jsonl", f"**/{name}.jsonl"), functools.partial(question, name)) for name in names}


BENCHMARKS: dict[str, Benchmark] = {
    "longbench": Benchmark(_named(tuple(LONGBENCH), _longbench), "https://huggingface.co/datasets/THUDM/LongBench"),
    "longbench_v2": Benchmark({"all": Files(("data.json",), _longbench_v2)}, "https://huggingface.co/datasets/THUDM/LongBench-v2"),
    "infinitebench_files": Benchmark(
        _named(tuple(INFINITEBENCH), _infinitebench), "https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench"
    ),
    "babilong_files": Benchmark(
        {task: Files((f"{task}/*.json", f"{task}*.json*"), functools.partial(_babilong, task)) for task in BABILONG_LABELS},
        "https://huggingface.co/datasets/RMT-team/babilong",
    ),
    "mrcr_files": Benchmark({"all": Files(("*.parquet",), _mrcr)}, "https://huggingface.co/datasets/openai/mrcr"),
    "graphwalks_files": Benchmark({"all": Files(("*.parquet",), _graphwalks)}, "https://huggingface.co/datasets/openai/graphwalks"),
}
"""Each under the name of its task."""
