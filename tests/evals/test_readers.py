"""Benchmarks that are read from files: their layouts, what fits, what is left out, and what is wrong with a folder."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lcx.core.errors import UserError
from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Materials
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.readers.table import BENCHMARKS, INFINITEBENCH, LONGBENCH
from lcx.evals.tasks.table import TASKS


def build(name, folder, lengths=(1024, 4096), samples=50):
    config = EvalConfig(lengths=lengths, questions=QuestionConfig(samples, data=folder and str(folder)))
    return TASKS[name](Materials(config, DataConfig(), tokenizers.load("bytes"), None))


class Answers:
    """A backend with one answer for every prompt that holds a text."""

    scheme, fingerprint, batch = "none", "answers", 4

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def complete(self, items, new_tokens):
        self.asked += [item.text for item in items]
        for number, item in enumerate(items):
            yield {number: next((answer for mark, answer in self.answers.items() if mark in item.text), "")}


def measured(task, backend, length):
    return {(row.task, row.metric): row for row in task.measure(backend, length, 50, AnswerLog(None))}


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")


def longbench(question, answer, context="long ago. " * 20, classes=None):
    return {"input": question, "context": context, "answers": [answer], "all_classes": classes, "length": 9, "language": "en"}


def test_longbench(tmp_path):
    lines(
        tmp_path / "hotpotqa.jsonl",
        longbench("Who? one", "Ada Lovelace"),
        longbench("Who? two", "Bob", context="far away. " * 200),
        longbench("Who? three", "Cleo", context="far away. " * 2000),
    )
    lines(tmp_path / "trec.jsonl", longbench("Question: four\nType:", "City", classes=["City", "Country"]))
    lines(tmp_path / "lcc.jsonl", longbench("", "x = 1", context="def five():\n"))
    task = build("longbench", tmp_path)
    backend = Answers({"one": " the Ada", "two": " Bob", "four": " City\nQuestion: Country", "five": "# no\nx = 1"})
    short, long = measured(task, backend, 1024), measured(task, backend, 4096)
    assert short["longbench_hotpotqa", "score"].value == pytest.approx(2 / 3) and short["longbench_hotpotqa", "score"].n == 1
    assert short["longbench_trec", "score"].value == short["longbench_lcc", "score"].value == 1
    assert long["longbench_hotpotqa", "score"].value == 1 and long["longbench_hotpotqa", "left_out"].value == pytest.approx(1 / 3)
    assert ("longbench_trec", "score") not in long
    assert any(text.endswith("def five():\n") for text in backend.asked)
    assert not any("three" in text for text in backend.asked)


def test_every_dataset_of_longbench_has_a_score(tmp_path):
    for name in LONGBENCH:
        if not name.endswith("_zh"):
            lines(tmp_path / f"{name}.jsonl", longbench(f"{name}?", "Paragraph 3", classes=["Paragraph 3", "no"]))
    rows = measured(build("longbench", tmp_path), Answers({"?": "Paragraph 3"}), 1024)
    values = {task: row.value for (task, metric), row in rows.items() if metric == "score"}
    assert set(values.values()) == {1.0} and len(values) == len(LONGBENCH) - 1


def test_longbench_v2(tmp_path):
    row = {"context": "text", "question": "what?", "answer": "C", **{f"choice_{x}": f"option {x}" for x in "ABCD"}}
    (tmp_path / "data.json").write_text(json.dumps([row, {**row, "question": "which?"}]))
    backend = Answers({"what?": "**The correct answer is (C)**", "which?": "The correct answer is (A)"})
    assert measured(build("longbench_v2", tmp_path), backend, 1024)["longbench_v2_all", "score"].value == 0.5
    assert "(D) option D" in backend.asked[0]


def test_infinitebench(tmp_path):
    for name in INFINITEBENCH:
        row = {"id": 0, "context": f"context of {name}", "input": "What?", "answer": ["71"], "options": []}
        if name in ("longbook_choice_eng", "code_debug"):
            row["options"] = ["70", "71", "72", "73"]
        lines(tmp_path / f"{name}.jsonl", row)
    right = {f"context of {name}": "B" if name in ("longbook_choice_eng", "code_debug") else "71" for name in INFINITEBENCH}
    right["context of longdialogue_qa_eng"] = "it was 71"
    rows = measured(build("infinitebench_files", tmp_path, lengths=(4096,)), Answers(right), 4096)
    values = {task.removeprefix("infinitebench_files_"): row.value for (task, metric), row in rows.items() if metric == "score"}
    assert values.pop("longdialogue_qa_eng") == 0  # names have letters
    assert set(values.values()) == {1.0} and len(values) == len(INFINITEBENCH) - 1


def test_babilong(tmp_path):
    (tmp_path / "qa1").mkdir()
    rows = [{"input": "John went to the garden.", "target": "garden", "question": "Where is John?"}]
    (tmp_path / "qa1" / "0k.json").write_text(json.dumps(rows))
    task = build("babilong_files", tmp_path)
    assert measured(task, Answers({"John": "The garden."}), 1024)["babilong_files_qa1", "score"].value == 1
    assert measured(task, Answers({"John": "garden or office"}), 1024)["babilong_files_qa1", "score"].value == 0
    rows = measured(task, Answers({}), 1024)
    assert rows["babilong_files_qa1", "score"].value == 0 and rows["babilong_files_qa1", "empty"].value == 1


def test_mrcr_and_graphwalks(tmp_path):
    messages = [
        {"role": "user", "content": "Write"},
        {"role": "assistant", "content": "a poem"},
        {"role": "user", "content": "Repeat"},
    ]
    row = {"prompt": json.dumps(messages), "answer": "abc a poem", "random_string_to_prepend": "abc"}
    (tmp_path / "mrcr").mkdir()
    (tmp_path / "walks").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "mrcr" / "a.parquet")
    walk = {"prompt": "edges", "answer_nodes": ["x", "y"], "problem_type": "bfs"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([walk]), tmp_path / "walks" / "a.parquet")
    backend = Answers({"Repeat": "abc a poem"})
    assert measured(build("mrcr_files", tmp_path / "mrcr"), backend, 1024)["mrcr_files_all", "score"].value == 1
    assert backend.asked == ["User: Write\nAssistant: a poem\nUser: Repeat\nAssistant:"]
    walks = build("graphwalks_files", tmp_path / "walks")
    assert measured(walks, Answers({"edges": "so\nFinal Answer: [x]"}), 1024)[
        "graphwalks_files_all", "score"
    ].value == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_folders_that_are_not_there(name, tmp_path):
    with pytest.raises(
        UserError, match=rf"{name} reads files; name their folder with --data .*it looks for .*they come from https://"
    ):
        build(name, None)
    with pytest.raises(UserError, match=rf"has no file of {name}; it looks for"):
        build(name, tmp_path)
    with pytest.raises(UserError, match="nowhere' is not a directory; it looks for"):
        build(name, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input": "a"}\n', r"hotpotqa.jsonl, row 1 has no 'answers'"),
        ('{"input": "a", "context": "b", "answers": 5}\n', "row 1 is laid out differently"),
        ("{broken\n", "cannot be read"),
        ("[1]\n", "does not hold a list of rows"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_wrong_files(content, message, tmp_path):
    (tmp_path / "hotpotqa.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        build("longbench", tmp_path)


def test_an_evaluation_of_files(tmp_path):
    import jax

    from lcx.core.param_spec import initialize
    from lcx.evals.runner import evaluate
    from lcx.model.architecture import build_schemes
    from lcx.model.config import ModelConfig
    from lcx.model.execution import ExecutionConfig
    from lcx.model.params import specs

    model = ModelConfig(model_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=32)
    schemes = build_schemes(model, {"default": "rope:theta=100"})
    params = initialize(specs(model, schemes, 1024), jax.random.key(0))
    lines(tmp_path / "hotpotqa.jsonl", longbench("Who?", "Ada"))
    said = []
    for lengths, wanted in (((1024,), "longbench, none: 1,024: 0%"), ((64,), "longbench, none: nothing of these lengths")):
        config = EvalConfig(tasks=("longbench",), lengths=lengths, questions=QuestionConfig(2, data=str(tmp_path)))
        evaluate(params, model, ExecutionConfig(), schemes, DataConfig(), config, trained=1024, announce=said.append)
        assert said[-1] == f"eval: {wanted}"


def test_samples_are_drawn_and_kept(tmp_path):
    lines(tmp_path / "hotpotqa.jsonl", *(longbench(f"Who? {i}", "Ada") for i in range(30)))
    task, log = build("longbench", tmp_path, samples=5), AnswerLog(tmp_path / "answers.jsonl")
    first = Answers({"Who": "Ada"})
    rows = task.measure(first, 1024, 5, log)
    assert len(first.asked) == 5 == rows[0].n and first.asked != sorted(first.asked)
    second = Answers({})
    assert task.measure(second, 1024, 5, AnswerLog(tmp_path / "answers.jsonl")) == rows and not second.asked
    assert np.isclose(rows[0].value, 1)
