"""Benchmarks that are read from files: their layouts, what fits, what is left out, and what is wrong with a folder."""

import json
import re
import sys

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
from lcx.evals.readers.bamboo import PARTS as BAMBOO
from lcx.evals.readers.files import records
from lcx.evals.readers.infinitebench import INFINITEBENCH
from lcx.evals.readers.leval import CLOSED, OPEN
from lcx.evals.readers.longbench import CHINESE, LONGBENCH
from lcx.evals.readers.nolima import Book
from lcx.evals.readers.table import BENCHMARKS
from lcx.evals.tasks.table import TASKS


def build(name, folder, lengths=(1024, 4096), samples=50, depths=(0.0, 0.5, 1.0)):
    config = EvalConfig(lengths=lengths, depths=depths, questions=QuestionConfig(samples, data=folder and str(folder)))
    return TASKS[name](Materials(config, DataConfig(), tokenizers.load("bytes"), None))


def test_a_broken_row_is_left_out_and_said(tmp_path, capsys):
    row = json.dumps(longbench("Who?", "Ada"))
    (tmp_path / "hotpotqa.jsonl").write_text(f'{row}\n{{"input": "so "called""}}\n{row[:-1]}, "bare": "a\tb"}}\n')
    assert len(build("longbench", tmp_path).questions["hotpotqa"]) == 2
    assert "hotpotqa.jsonl, row 2 is not JSON" in capsys.readouterr().err
    (tmp_path / "hotpotqa.jsonl").write_text(f"{row}\n{row[:50]}")
    with pytest.raises(UserError, match="hotpotqa.jsonl cannot be read .*fetch it again"):
        build("longbench", tmp_path)


class Answers:
    """A backend with one answer for every prompt that holds a text."""

    scheme, fingerprint, batch = "none", "answers", 4

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def complete(self, items, new_tokens):
        self.asked += [item.text for item in items]
        for number, item in enumerate(items):
            yield {number: next((answer for mark, answer in self.answers.items() if mark in item.text), "")}


class Cut(Answers):
    """The same, with a token for each byte and no more of an answer than was asked for."""

    def complete(self, items, new_tokens):
        for found in super().complete(items, new_tokens):
            yield {number: text[:new_tokens] for number, text in found.items()}


def measured(task, backend, length):
    return {(row.task, row.metric): row for row in task.measure(backend, length, 50, AnswerLog(None))}


def scored(name, folder, answers, length=1024):
    """The scores of a benchmark's parts in a folder, by part, and what was asked."""
    backend = Answers(answers)
    rows = measured(build(name, folder, (length,)), backend, length)
    return {task.removeprefix(f"{name}_"): row.value for (task, metric), row in rows.items() if metric == "score"}, backend.asked


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
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
    names = [name for name, dataset in LONGBENCH.items() if dataset.needs is None]
    for name in names:
        lines(tmp_path / f"{name}.jsonl", longbench(f"{name}?", "Paragraph 3", classes=["Paragraph 3", "no"]))
    values, _ = scored("longbench", tmp_path, {"?": "Paragraph 3"})
    assert set(values.values()) == {1.0} and set(values) == set(names) and len(LONGBENCH) == 21


def test_chinese_datasets_of_longbench(tmp_path):
    pytest.importorskip("jieba", reason="the extra suites")
    for name in CHINESE:
        lines(
            tmp_path / f"{name}.jsonl", longbench("" if name == "vcsum" else f"{name}？", "段落3", "很长。" * 9, ["段落3", "体育"])
        )
    values, asked = scored("longbench", tmp_path, {"很长": "段落3"})
    assert values == dict.fromkeys(CHINESE, 1.0)
    assert sum(text.endswith("\n回答：") for text in asked) == 4 and any(text.endswith("lsht？") for text in asked)


def test_a_part_names_the_library_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    lines(tmp_path / "dureader.jsonl", longbench("？", "段落3"))
    with pytest.raises(UserError, match="longbench_dureader needs the jieba library"):
        build("longbench", tmp_path)


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
    long = {**row, "answer": "abc" + " a line of the poem" * 40}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([long]), tmp_path / "mrcr" / "a.parquet")
    found = measured(build("mrcr_files", tmp_path / "mrcr", (4096,)), Cut({"Repeat": long["answer"]}), 4096)
    assert found["mrcr_files_all", "score"].value == 1
    walks = build("graphwalks_files", tmp_path / "walks")
    assert measured(walks, Answers({"edges": "so\nFinal Answer: [x]"}), 1024)[
        "graphwalks_files_all", "score"
    ].value == pytest.approx(2 / 3)


def leval(instruction, output, evaluation="exam"):
    return {"input": "a document", "instructions": instruction, "outputs": output, "evaluation": evaluation, "source": "x"}


def test_leval(tmp_path):
    closed, opened = tmp_path / "LEval-data" / "Closed-ended-tasks", tmp_path / "LEval-data" / "Open-ended-tasks"
    lines(closed / "tpo.jsonl", leval(["one?\nA. x\nB. y", "two?\nA. x\nB. y"], ["A", "B"]))
    lines(closed / "coursera.jsonl", leval(["three?\nA. x\nB. y"], ["AB"]))
    lines(closed / "sci_fi.jsonl", leval(["four, True or False?"], ["True [fact: False]"]))
    lines(
        opened / "scientific_qa.jsonl",
        leval(["five?"], ["the wide sea"], "f1"), leval(["six?"], ["by people"], "human"), leval(["seven?"], ["by GPT-4"], "LLM"),
    )  # fmt: skip
    lines(opened / "news_summ.jsonl", leval(["Summarise it."], ["a cat sat down"], "rouge"))
    right = {"one": "A", "two": "A", "three": "B", "four": "True [fact: True]", "five": "wide sea", "Summarise": "a cat sat down"}
    values, asked = scored("leval", tmp_path, right)
    assert values == {"tpo": 0.5, "coursera": 0.25, "sci_fi": 0.5, "scientific_qa": 1.0, "news_summ": pytest.approx(1)}
    assert len(asked) == 6 and not any("six" in text or "seven" in text for text in asked)
    assert all("a document" in text and text.endswith("\nAnswer:") for text in asked)
    assert any("five?\nWrite about 3 words." in text for text in asked)
    lines(closed / "tpo.jsonl", {"input": "x", "instructions": ["a", "b"], "outputs": ["A"], "evaluation": "exam"})
    with pytest.raises(UserError, match=r"tpo.jsonl, row 1 is laid out differently \(ValueError"):
        build("leval", tmp_path)
    lines(closed / "tpo.jsonl", {"input": "x", "instruction": ["a"], "outputs": ["A"]})
    with pytest.raises(UserError, match="tpo.jsonl, row 1 has no 'instructions'"):
        build("leval", tmp_path)


def test_every_task_of_leval_has_a_score(tmp_path):
    for name in (*CLOSED, *OPEN):
        evaluation = "exam" if name in CLOSED else "rouge" if "summ" in name or name == "paper_assistant" else "f1"
        output = {"sci_fi": "True [fact: False]", "gsm100": "12", "codeU": "12"}.get(
            name, "A" if name in CLOSED else "12 blue cats"
        )
        lines(tmp_path / f"{name}.jsonl", leval([f"{name}?"], [output], evaluation))
    right = {f"{name}?": "12 blue cats" for name in OPEN} | {f"{name}?": "A" for name in CLOSED}
    values, _ = scored("leval", tmp_path, {**right, "sci_fi?": "true [fact: false]", "gsm100?": "12", "codeU?": "12"})
    assert set(values) == {*CLOSED, *OPEN} and list(values.values()) == pytest.approx([1] * len(values))


def zeroscrolls(id, document, query, output):
    text = f"Told.\n\nText:\n{document}\n\n{query}\n\nAnswer:"
    at, asked = text.index(document), text.index(query) if query else len(text)
    return {
        "id": id, "pid": f"{id}_0", "input": text, "output": output, "document_start_index": at,
        "document_end_index": at + len(document), "query_start_index": asked, "query_end_index": asked + len(query),
        "truncation_seperator": "...", "inner_docs_start_indices": [],
    }  # fmt: skip


def test_zeroscrolls(tmp_path):
    lines(
        tmp_path / "qasper" / "validation.jsonl",
        zeroscrolls("1", "a paper", "Question:\none?", "a wide sea"), zeroscrolls("1", "a paper", "Question:\none?", "Café"),
        zeroscrolls("2", "a paper", "Question:\ntwo?", "unanswerable"),
    )  # fmt: skip
    lines(tmp_path / "quality" / "validation.jsonl", zeroscrolls("1", "a story", "Question: three?\n(A) x (B) y", "(B) y"))
    lines(tmp_path / "space_digest" / "validation.jsonl", zeroscrolls("1", "reviews of four", "", "40%"))
    lines(tmp_path / "book_sum_sort" / "validation.jsonl", zeroscrolls("1", "chapters of five", "", "3, 1, 2"))
    lines(tmp_path / "gov_report" / "validation.jsonl", zeroscrolls("1", "a report of six", "", "a cat sat down"))
    lines(tmp_path / "gov_report" / "test.jsonl", zeroscrolls("1", "not seven", "", None))
    right = {"one?": "cafe", "two?": "no", "three?": "B", "of four": "50%", "of five": "1, 3, 2", "of six": "a cat sat down"}
    values, asked = scored("zeroscrolls", tmp_path, right, 4096)
    assert values.pop("gov_report") == pytest.approx(1) and values.pop("book_sum_sort") == pytest.approx(2 / 3)
    assert values == {"qasper": 0.5, "quality": 1, "space_digest": 0.5}
    assert len(asked) == 6 and not any("Told." in text or "seven" in text for text in asked)
    assert any("a paper\n\nQuestion:\none?\n\nAnswer the question" in text for text in asked)
    lines(tmp_path / "qasper" / "validation.jsonl", zeroscrolls("1", "a paper", "", None))
    with pytest.raises(
        UserError, match=r"qasper.validation.jsonl, row 1 is laid out differently \(ValueError: no document, or no answer"
    ):
        build("zeroscrolls", tmp_path)


def test_bamboo(tmp_path):
    options = ["A. red", "B. blue", "C. green", "D. grey"]
    claims = [{"title": "t", "content": "a paper", "hypothesis": f"claim {i}", "answer": i < 2} for i in range(4)]
    lines(tmp_path / "altqa_4k.jsonl", {"content": "documents\n\nQuestion:\none?", "answer": "1964"})
    lines(
        tmp_path / "paperqa_4k.jsonl", {"content": "a paper", "question": "two?", "options": options, "answer": "B", "evidence": ""}
    )
    lines(tmp_path / "showspred_16k.jsonl", {"content": '"Hello" said by Summer\n"three" said by ', "answer": "Summer"})
    lines(tmp_path / "senhallu_4k.jsonl", *claims)
    lines(tmp_path / "showssort_4k.jsonl", {"content": ["four", "x", "y"], "answer": [2, 0, 1]})
    lines(tmp_path / "reportsumsort_4k.jsonl", {"content": "a text", "summaries": ["five", "x", "y"], "answer": [2, 0, 1]})
    right = {
        "one?": "1964.",
        "two?": "b",
        "three": "summer.\nMorty",
        "claim 0": "Yes",
        "claim 1": "No",
        "claim 2": "Yes",
        "claim 3": "No",
    }
    backend = Answers({**right, "four": "[2] > [0] > [1]", "five": "0 > 2 > 1"})
    rows = measured(build("bamboo", tmp_path), backend, 1024)
    values = {task.removeprefix("bamboo_"): row.value for (task, metric), row in rows.items() if metric == "score"}
    assert values.pop("reportsumsort_4k") == pytest.approx(2 / 3)
    assert values == {"altqa_4k": 1, "paperqa_4k": 1, "showspred_16k": 1, "senhallu_4k": 0.5, "showssort_4k": 1}
    assert [rows["bamboo_senhallu_4k", metric].value for metric in ("precision", "recall", "f1")] == [0.5, 0.5, 0.5]
    assert ("bamboo_altqa_4k", "f1") not in rows and len(BAMBOO) == 18
    assert any("B. blue\nC. green" in text for text in backend.asked)
    assert any("a text" in text and "[0] five\n[1] x" in text for text in backend.asked)
    lines(tmp_path / "senhallu_4k.jsonl", {"content": "a paper", "hypothesis": "x", "answer": "maybe"})
    with pytest.raises(UserError, match="senhallu_4k.jsonl, row 1 is laid out differently"):
        build("bamboo", tmp_path)


def kilt(question, answer, title="Nile", **more):
    return {"question": question, "answers": [answer], "ctxs": [{"title": title, "text": f"text about {title}"}], **more}


def test_helmet(tmp_path):
    data = tmp_path / "data"
    pair = {"context": '{"a": "1"}', "question": "one", "answer": "17", "num_kvs": 3, "demos": [["k", "5"], ["l", "6"], ["m", "7"]]}
    needles = {"context": "text", "query": "two-key", "type_needle_v": "numbers", "outputs": ["11", "22"], "length": 9}
    lines(data / "json_kv" / "test_k50_dep6.jsonl", pair)
    lines(data / "ruler" / "niah_multivalue" / "validation_8192.jsonl", needles)
    lines(data / "ruler" / "niah_multikey_2" / "validation_8192.jsonl", {**needles, "query": "three", "answer": ["33"]})
    lines(data / "kilt" / "nq-dev-multikilt_1000_k50_dep6.jsonl", kilt("four?", "Ada"))
    lines(
        data / "kilt" / "nq-train-multikilt_1000_k3_dep6.jsonl", *(kilt(f"solved {i}?", f"so {i}", f"Rhine {i}") for i in range(9))
    )
    lines(data / "kilt" / "popqa_test_1000_k50_dep6.jsonl", kilt("five?", "Bob", s_pop=900), kilt("six?", "Bob", s_pop=5000))
    lines(data / "kilt" / "popqa_test_1000_k3_dep6.jsonl", kilt("five?", "Bob", s_pop=900), kilt("seven?", "Cleo", s_pop=9))
    right = {"Key: one": "17.", "two-key": "22 and 33", "three": "33", "four?": "ada.\nso", "five?": "it is\nBob"}
    values, asked = scored("helmet", tmp_path, right, 4096)
    assert values == {"json_kv": 1, "niah_mv": 0.5, "niah_mk_2": 1, "nq": 1, "popqa": 0} and len(asked) == 5
    assert any("Key: k\nValue: 5\n\nKey: l\nValue: 6\n\nKey: one\nValue:" in text for text in asked)
    nq, popqa = (next(text for text in asked if mark in text) for mark in ("four?", "five?"))
    assert nq.count("\nAnswer: so ") == 2 and nq.endswith("Document: Nile\ntext about Nile\n\nQuestion: four?\nAnswer:")
    assert popqa.count("five?") == popqa.count("seven?") == 1
    lines(data / "kilt" / "popqa_test_1000_k50_dep6.jsonl", kilt("five?", "Bob"))
    with pytest.raises(UserError, match="popqa_test_1000_k50_dep6.jsonl, row 1 has no 's_pop'"):
        build("helmet", tmp_path)


def test_helmet_without_solved_examples_and_with_many_rows(tmp_path, capsys):
    lines(tmp_path / "nq-dev-multikilt_1000_k50_dep6.jsonl", *(kilt(f"question {i}?", "Ada") for i in range(250)))
    task = build("helmet", tmp_path, (4096,))
    assert "has no solved examples in its prompts" in capsys.readouterr().err
    assert len({question.sample.prompt for question in task.questions["nq"]}) == 100
    again = build("helmet", tmp_path, (4096,))
    assert [one.sample for one in again.questions["nq"]] == [one.sample for one in task.questions["nq"]]


class Learner(Answers):
    """Answers with the label of a text that holds the same word as the last one."""

    def complete(self, items, new_tokens):
        for number, item in enumerate(items):
            known = dict(re.findall(r"(\w+) of text \d+\nlabel: (\d+)", item.text))
            asked = re.findall(r"(\w+) to be labelled\nlabel:$", item.text)[0]
            yield {number: f" {known.get(asked)}\nlabel: 0"}


def test_in_context_learning_of_helmet(tmp_path, capsys):
    kinds = [f"kind{i}" for i in range(6)]
    train = [{"text": f"{kind} of text {n}", "coarse_label": i, "fine_label": i} for i, kind in enumerate(kinds) for n in range(3)]
    test = [{"text": f"{kind} to be labelled", "coarse_label": i, "fine_label": i} for i, kind in enumerate(kinds)]
    folder = tmp_path / "trec" / "default"
    (folder / "train").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(train), folder / "train" / "0000.parquet")
    lines(folder / "test.jsonl", *test)
    lines(tmp_path / "nlu_evaluation_data" / "train.jsonl", *({**row, "label": row["coarse_label"]} for row in train))
    task = build("helmet", tmp_path, (128, 1024), samples=10)
    assert [fitted.name for fitted in task.fitted] == ["helmet_icl_trec_coarse", "helmet_icl_trec_fine", "helmet_icl_nlu"]
    coarse = task.fitted[0]
    first = coarse.items(1024, 4)
    assert all(900 < len(item.prompt) <= 1024 and item.units > 12 for item in first)
    assert len({item.references for item in first}) > 1
    # Rounds of all classes, each class under one number.
    pairs = re.findall(r"(\w+) of text \d+\nlabel: (\d+)", first[0].text)
    assert {kind for kind, _ in pairs[:6]} == set(kinds) and len(set(pairs)) == 6 == len({number for _, number in pairs})
    rows = {(row.task, row.metric): row for row in coarse.measure(Learner({}), 1024, 10, AnswerLog(None))}
    assert rows["helmet_icl_trec_coarse", "score"].value == 1
    assert rows["helmet_icl_trec_coarse", "chance"].value == pytest.approx(1 / 6)
    assert rows["helmet_icl_trec_coarse", "shots"].value > 12
    assert {row.task for row in task.measure(Learner({}), 128, 2, AnswerLog(None))} <= {fitted.name for fitted in task.fitted}
    assert build("helmet", tmp_path, (48,)).measure(Learner({}), 48, 2, AnswerLog(None)) == []
    assert "helmet_icl_nlu is left out at 48, which its shortest question does not fit into" in capsys.readouterr().err
    lines(tmp_path / "banking77" / "train.jsonl", {"sentence": "x", "label": 1})
    with pytest.raises(UserError, match="train.jsonl, row 1 has no 'text'"):
        build("helmet", tmp_path)


def nolima(**changes):
    return {
        "id": "0001", "reasoning_type": "world_knowledge", "system_prompt": "", "needle": "By the way, {CHAR} sleeps near {1}.",
        "questions": {"onehop": "Who has been to {2}?", "twohop": "Who has been to {3}?"}, "character_set": ["Ann", "Bob"],
        "tests": {"T1": {"input_args": ["the old gate", "Bern", "Europe"]}}, **changes,
    }  # fmt: skip


def test_nolima(tmp_path):
    with pytest.raises(UserError, match="has no file of nolima"):
        build("nolima", tmp_path)
    (tmp_path / "needle_set.json").write_text(json.dumps([nolima()]))
    with pytest.raises(UserError, match="nolima_standard has no book to put needles into"):
        build("nolima", tmp_path)
    books = tmp_path / "haystack" / "rand_shuffle"
    books.mkdir(parents=True)
    for book in (1, 2):
        text = "\n".join(" ".join(f"word{book}-{line}-{i}" for i in range(8)) for line in range(400))
        (books / f"rand_book_{book}.txt").write_text(text)
    assert build("nolima", tmp_path, depths=()) is None
    task = build("nolima", tmp_path, (1024, 4096), samples=6).fitted[0]
    for length in (1024, 4096):
        for item in task.items(length, 4):
            body = item.text.partition("\n\n")[2].partition("\n\nQuestion:")[0]
            found = re.search(r"(?:^|\n)By the way, (Ann|Bob) sleeps near the old gate\.(?:\n|$)", body)
            assert item.references == (found[1],) and "{" not in item.text and re.search(r"been to (Bern|Europe)\?", item.text)
            before, behind = len(body[: found.start()].split()), len(body[found.end() :].split())
            assert abs(before - item.depth * (before + behind)) <= 1
            assert 0.9 * length < len(item.prompt) + task.new_tokens(length) <= length
    rows = task.measure(Answers({"Ann sleeps": "It was Ann", "Bob sleeps": "it was bob"}), 1024, 6, AnswerLog(None))
    scores = {row.depth: row.value for row in rows if row.metric == "score"}
    assert set(scores) == {0.0, 0.5, 1.0} and 0 < sum(scores.values()) < 3
    (tmp_path / "needle_set.json").write_text(json.dumps([nolima(tests={"T1": {"args": []}})]))
    with pytest.raises(UserError, match="needle_set.json, row 1 has no 'input_args'"):
        build("nolima", tmp_path)
    (tmp_path / "needle_set.json").write_text(json.dumps([nolima(needle="{1} is red.", tests={"T1": {"input_args": ["x"]}})]))
    with pytest.raises(UserError, match="needle_set.json, row 1 has no 'gold_answers'"):
        build("nolima", tmp_path)


@pytest.mark.parametrize("words", [1, 7, 40, 100])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_window_of_a_book(words, depth):
    book = Book("a b c d e\n\nf g\nh i j k\n", "book")
    before, behind = book.around(words, depth)
    assert len(before.split()) == round(depth * words) and len((before + behind).split()) == words
    assert not before or before.endswith("\n")
    assert "".join((before + behind).split()) in "abcdefghijk" * 20
    assert behind == "" or behind.split()[0] in "afh"


def test_a_book_without_lines():
    with pytest.raises(UserError, match="book has fewer than two lines"):
        Book("one line\n", "book")


def oolong(question, answer, kind, text="Date: x || User: 1 || Instance: spam"):
    return {
        "id": 1, "context_len": 1024, "dataset": "spam", "context_window_text": text, "context_window_text_with_labels": "ham",
        "question": question, "task_group": "counting", "answer": answer, "answer_type": f"ANSWER_TYPE.{kind}",
    }  # fmt: skip


def test_oolong(tmp_path):
    rows = [
        oolong("one?", "['ham']", "LABEL"),
        oolong("two?", "[7]", "NUMERIC"),
        oolong("three?", "[datetime.date(2023, 1, 5)]", "DATE"),
        oolong("four?", "['more common than']", "COMPARISON"),
    ]
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "test-00000.parquet", row_group_size=3)
    lines(tmp_path / "dnd" / "test.jsonl", {"context_window_text": "episodes", "question": "five?", "answer": "Ann, Bob"})
    right = {"one?": "Label: ham", "two?": "Answer: 8", "three?": "Date: January 5, 2023", "four?": "Answer: less common than"}
    values, asked = scored("oolong", tmp_path, {**right, "five?": r"\boxed{Bob, Cleo}"})
    assert values == {"synth": pytest.approx((1 + 0.75 + 1 + 0) / 4), "real": 0.5}
    assert "Date: x || User: 1 || Instance: spam\none?" in asked and "episodes\nfive?" in asked
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([oolong("x", "ham", "LABEL")]), tmp_path / "data" / "test-00000.parquet")
    with pytest.raises(UserError, match="test-00000.parquet, row 1 is laid out differently"):
        build("oolong", tmp_path)


def test_rows_that_are_drawn_of_a_file(tmp_path):
    rows = [{"n": n} for n in range(30)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.parquet", "a.jsonl", "a.json"):
        assert [row["n"] for _, row in records(tmp_path / name)] == list(range(30))
        drawn = list(records(tmp_path / name, 9))
        assert len(drawn) == 9 and all(place.endswith(f"{name}, row {row['n'] + 1}") for place, row in drawn)
        assert drawn == list(records(tmp_path / name, 9))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_folders_that_are_not_there(name, tmp_path):
    with pytest.raises(
        UserError, match=rf"{name} reads files; name their folder with evals.questions.data.*it looks for .*they come from https://"
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
