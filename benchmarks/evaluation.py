"""Evaluation in words: RULER against transformers' `generate`, and the needle grid with and without what its questions share.

    python benchmarks/evaluation.py --model=models/SmolLM2-135M-Instruct --qa_1=dev-v2.0.json
    python benchmarks/evaluation.py --model=... --parts=grid --grid_lengths=4096      one part, one length

The same token ids go to both sides, greedily, in float32 on all cores; each side is a process of its own, and they take turns, a
RULER task each. transformers answers one prompt after the other, and then the same ones side by side as one padded batch; the
ratio is to the faster of the two. Loading and compiling are not counted. The grid is `needle_in_prose`, all depths of each text, by
lcx alone, in turns with `share_prefixes` and without.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from process import Process

from lcx.data.config import DataConfig
from lcx.evals.base import Item
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.runner import chosen_tasks, gather
from lcx.evals.text.questions import TextQuestions
from lcx.recipes import models

HERE = Path(__file__).resolve().parent

FLAGS = flags.FLAGS
flags.DEFINE_string("out", str(HERE / "results" / "evaluation.json"), "Where the figures are written.")
flags.DEFINE_string("model", None, "A Hugging Face folder.", required=True)
flags.DEFINE_string("qa_1", None, "A question file laid out like SQuAD's; without it RULER's ruler_qa_1 is left out.")
flags.DEFINE_list("parts", ["ruler", "grid"], "What to measure.")
flags.DEFINE_integer("ruler_length", 4096, "Tokens of RULER's prompts with their answers.", lower_bound=256)
flags.DEFINE_integer("samples", 2, "Questions of each RULER task.", lower_bound=1)
flags.DEFINE_list("grid_lengths", ["4096", "16384"], "Tokens of the grid's prompts.")
flags.DEFINE_integer("texts", 1, "Texts of the grid at each length.", lower_bound=1)


def asked(data: DataConfig, name: str, length: int, samples: int) -> dict[str, tuple[TextQuestions, list[Item], int]]:
    """The questions of a task or group by task, and how many tokens are left for an answer."""
    config = EvalConfig(tasks=(name,), lengths=(length,), questions=QuestionConfig(samples, "chat", qa_1=FLAGS.qa_1))
    materials = gather(data, config)
    made = {task.name: task for row in chosen_tasks(config) if isinstance(task := row(materials), TextQuestions)}
    return {name: (task, task.items(length, samples), task.new_tokens(length)) for name, task in made.items()}


def sides(groups: dict, cases: dict[str, tuple[str, dict[str, Any]]]) -> tuple[dict[str, dict], dict[str, Any]]:
    """Seconds, scores and answers of each side by task, and what each side says of itself; the sides take turns."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.json"
        prompts = {
            name: {"prompts": [item.prompt.tolist() for item in items], "new_tokens": new}
            for name, (_, items, new) in groups.items()
        }
        file.write_text(json.dumps(prompts))
        running = {side: Process(side, script, {**case, "prompts": str(file)}) for side, (script, case) in cases.items()}
        found: dict[str, dict] = {side: {} for side in running}
        for name, (task, items, _) in groups.items():
            for side, process in running.items():
                answer = process.ask(name)
                scores = [task.score(item, text) for item, text in zip(items, answer["texts"], strict=True)]
                found[side][name] = {"seconds": answer["seconds"], "score": sum(scores) / len(scores), "texts": answer["texts"]}
                print(f"{name}: {side} {answer['seconds']:.1f} s, score {100 * found[side][name]['score']:.0f}", flush=True)
        facts = {side: {**process.facts, **process.finish()} for side, process in running.items()}
    return found, facts


def shown(found: dict[str, dict], facts: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the sides: seconds in all and by task, mean scores, and the share of answers that are the first side's."""
    first, *others = found
    texts = {side: [text for row in rows.values() for text in row["texts"]] for side, rows in found.items()}
    same = {side: _share(texts[first], texts[side]) for side in others}
    return {
        "seconds": {side: sum(row["seconds"] for row in rows.values()) for side, rows in found.items()},
        "by_task": {side: {name: row["seconds"] for name, row in rows.items()} for side, rows in found.items()},
        "score": {side: sum(row["score"] for row in rows.values()) / len(rows) for side, rows in found.items()},
        "prompts": len(texts[first]), "same_answers": same, "sides": facts,
    }  # fmt: skip


def _share(a: Sequence[str], b: Sequence[str]) -> float:
    return sum(x.strip() == y.strip() for x, y in zip(a, b, strict=True)) / len(a)


def ruler(data: DataConfig) -> dict[str, Any]:
    """RULER on both sides."""
    length = FLAGS.ruler_length
    case = {"model": FLAGS.model, "length": length, "share_prefixes": True}
    peers = {f"transformers, {rows} at a time": ("ask_torch", {**case, "rows": rows}) for rows in sorted({1, FLAGS.samples})}
    groups = asked(data, "ruler", length, FLAGS.samples)
    result = shown(*sides(groups, {"lcx": ("ask_lcx", case), **peers}))
    fastest = min(seconds for side, seconds in result["seconds"].items() if side != "lcx")
    return {"length": length, "ratio": fastest / result["seconds"]["lcx"], **result}


def grid(data: DataConfig, length: int) -> dict[str, Any]:
    """The needle grid with shared prefixes and without."""
    case = {"model": FLAGS.model, "length": length}
    groups = asked(data, "needle_in_prose", length, FLAGS.texts)
    both = {"shared": ("ask_lcx", {**case, "share_prefixes": True}), "apart": ("ask_lcx", {**case, "share_prefixes": False})}
    result = shown(*sides(groups, both))
    return {"length": length, "ratio": result["seconds"]["shared"] / result["seconds"]["apart"], **result}


def main(argv: list[str]) -> None:
    """Measure, show, write; parts and lengths that are not measured now are kept."""
    if len(argv) > 1 or not {"ruler", "grid"}.issuperset(FLAGS.parts):
        sys.exit(f"unknown arguments {argv[1:]} or parts {FLAGS.parts}; see --help")
    data, out = models.load(FLAGS.model).run.data, Path(FLAGS.out)
    record = json.loads(out.read_text()) if out.exists() else {"grid": {}}
    record["machine"] = {"cores": len(os.sched_getaffinity(0)), "system": platform.system()}
    if "ruler" in FLAGS.parts:
        record["ruler"] = ruler(data)
        print(f"RULER at {FLAGS.ruler_length:,}: {record['ruler']['ratio']:.2f} times as fast as transformers")
        out.write_text(json.dumps(record, indent=1) + "\n")
    for length in map(int, FLAGS.grid_lengths if "grid" in FLAGS.parts else ()):
        record["grid"][str(length)] = grid(data, length)
        print(f"needle grid at {length:,}: {record['grid'][str(length)]['ratio']:.2f} of the time without sharing")
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
