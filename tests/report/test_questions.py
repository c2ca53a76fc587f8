"""Scores, published averages and answers of questions in words, in a report."""

import csv
import dataclasses
import json
import re

from lcx.evals import results
from lcx.evals.results import EvalResult, Measurement
from lcx.evals.statistics import interval
from lcx.report import question_plots, questions
from lcx.report.report import write_report


def rows(task, length, scores, depths=(None,)):
    low, high = interval(scores)
    value = sum(scores) / len(scores)
    made = [Measurement(task, "score", length, value, len(scores), depth, low=low, high=high) for depth in depths]
    return [*made, Measurement(task, "empty", length, 0.25 if value == 0 else 0.0, len(scores))]


def write(workdir):
    found = [row for length in (4096, 8192) for row in rows("ruler_vt", length, [0.4, 1.0, 0.6, 1.0])]
    found += rows("ruler_cwe", 4096, [0.0, 0.0]) + rows("passkey", 4096, [1.0, 0.0], (0.0, 0.5, 1.0))
    found += [Measurement("ruler", "average", length, 0.375, 2) for length in (4096, 8192)]
    results.write(EvalResult("tuned", 8192, 7, tuple(found)), workdir / "eval" / "tuned.json")
    common = {"task": "ruler_vt", "depth": None, "fill": 1.0, "seconds": 0.1, "asked": "they are:", "references": ["A", "B"]}
    answers = [
        {**common, "number": i, "length": length, "output": output, "score": score}
        for length in (4096, 8192)
        for i, (output, score) in enumerate((("<A> B", 1.0), ("", 0.0), ("A", 0.5), ("B", 0.5)))
    ]
    (workdir / "eval" / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def test_scores_averages_and_answers(tmp_path):
    write(tmp_path)
    page = write_report(tmp_path).read_text()
    # One model with several tasks has a heatmap of them.
    assert (tmp_path / "plots" / "tasks.png").exists() and "alt='tasks'" in page and "alt='growth_" not in page
    assert "<td>vt</td><td>75.0 <span>±" in page and "<tr class='strong'><td>average of 2</td><td>37.5</td><td>37.5</td>" in page
    # Published averages stand under the lengths that they were measured at.
    assert "<tr class='dim'><td>Llama-3.1-8B-Instruct</td><td>95.5</td><td>93.8</td>" in page
    assert "up to 25%, in ruler_cwe at 4,096" in page
    assert (tmp_path / "plots" / "depths_passkey.png").exists() and "alt='depths_passkey'" in page
    # The longest length alone is read: two wrong answers, then the right one.
    assert "ruler_vt at 8,192, 1 of 4 right" in page and page.count("the prompt ends") == 3
    assert page.index("(nothing)") < page.index("&lt;A&gt; B") and "Evaluations of" in page


def test_a_score_is_of_all_depths():
    by_depth = ((0.0, [1.0] * 20), (1.0, [0.0] * 20))
    found = [
        dataclasses.replace(row, scores=tuple(scores))
        for depth, scores in by_depth
        for row in rows("passkey", 4096, scores, (depth,))
        if row.metric == "score"
    ]
    said = questions.section([EvalResult("tuned", 4096, rows=tuple(found))])
    assert "<td>passkey</td><td>50.0 <span>±15</span></td>" in said and "Mean scores of 40 questions a cell" in said
    both = questions.section([EvalResult("tuned", 4096, rows=(*found, *rows("ruler_vt", 4096, [1.0] * 20)))])
    assert "Mean scores of 20 to 40 questions a cell" in both


def test_the_effective_length_is_of_lengths_that_all_tasks_were_asked_at():
    found = [*rows("ruler_vt", 512, [0.0]), *rows("ruler_vt", 4096, [1.0]), *rows("ruler_cwe", 4096, [1.0])]
    found.append(Measurement("ruler", "average", 4096, 1.0, 2))
    assert "every average exceeds 85.6%: 4,096" in questions.section([EvalResult("tuned", 4096, rows=tuple(found))])


def test_answers_say_who_gave_them(tmp_path):
    write(tmp_path)
    path = tmp_path / "eval" / "answers.jsonl"
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    givers = (("tuned", "none"), ("tuned", "yarn:factor=2"), ("stopped", "none"))
    said = [{**answer, "label": label, "scheme": scheme} for label, scheme in givers for answer in answers]
    path.write_text("".join(json.dumps(answer) + "\n" for answer in said))
    page = write_report(tmp_path).read_text()
    assert re.findall(r"<summary>(.*?)</summary>", page)[:3] == [
        "tuned: ruler_vt at 8,192, 1 of 4 right",
        "tuned, yarn:factor=2: ruler_vt at 8,192, 1 of 4 right",
        "stopped, interrupted: ruler_vt at 8,192, 1 of 4 right",
    ]


def test_scores_by_number_of_shots(tmp_path):
    found = [row for length in (1024, 2048) for row in rows("many_shot", length, [1.0, 0.0])]
    found += [Measurement("many_shot", "shots", length, length / 64, 2) for length in (1024, 2048)]
    found += [Measurement("many_shot", "chance", length, 1 / 6, 2) for length in (1024, 2048)]
    linear = [dataclasses.replace(row, scheme="linear") for row in found]
    result = EvalResult("tuned", 8192, 7, (*found, *linear))
    named = question_plots.by_scheme([result])
    assert list(named) == ["tuned", "tuned, linear"] and question_plots.growth("passkey", named) is None
    (axes,) = question_plots.growth("many_shot", named).axes
    assert [line.get_xdata().tolist() for line in axes.lines[:2]] == [[16, 32]] * 2
    assert axes.get_xlabel() == "shots in the prompt" and any(text.get_text() == "a guess" for text in axes.texts)
    results.write(result, tmp_path / "eval" / "tuned.json")
    write_report(tmp_path)
    assert (tmp_path / "plots" / "growth_many_shot.png").exists()


def test_scores_for_other_programs(tmp_path):
    write(tmp_path)
    write_report(tmp_path)
    lines = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert len(lines) == len(results.read(tmp_path / "eval" / "tuned.json").rows)
    cell = next(line for line in lines if line["task"] == "passkey" and line["depth"] == "0.5")
    assert (cell["label"], cell["step"], cell["length"], float(cell["value"]), cell["n"]) == ("tuned", "7", "4096", 0.5, "2")
    assert "| ruler_vt | 75.0 | 75.0 |\n| ruler_cwe | 0.0 |  |\n" in (tmp_path / "scores.md").read_text()
