"""Single needles, RULER, and ten tasks in short texts, asked of SmolLM2-135M-Instruct as it is and extended.

    python experiments/008_real_model/questions.py --books='books/*.txt' --squad=squad.json --workdir=runs/008_real_model

The workdir is that of run.py, --squad a file laid out like SQuAD's. Resumes: what is measured is kept in the workdir, length by
length. --lengths, --lengths_before and --samples choose how long it takes: on two cores with AMX a text of each of the twelve tasks
takes two minutes at 4,096 tokens, 12 at 16,384 and 45 at 32,768. Writes questions.json, a picture and three tables of README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from run import HERE, evaluated, length_table, percent

from lcx.core.console import say
from lcx.evals import comparison
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.results import EvalResult, plain_rows
from lcx.evals.tasks.table import GROUPS
from lcx.evals.text.questions import average
from lcx.recipes import models
from lcx.report import markdown, plots, style
from lcx.training.loading import Loaded

RULER = tuple(name for name in GROUPS["ruler"] if name != "ruler_qa_2")
"""All but the questions that need HotpotQA's file."""
SHORT = (
    "needle_in_prose", "passkey", "key_value", "induction", "many_shot", "session_state", "ruler_niah_single_2",
    "ruler_niah_multikey_1", "ruler_vt", "ruler_qa_1",
)  # fmt: skip
SHORT_LENGTH = 1024
SINGLE = "single_needle_in_prose"
MODELS = ("as it is", "extended")
WITHIN = 8192
"""Of longer texts there is one."""


def asked(model: Loaded, name: str, tasks: tuple[str, ...], length: int, samples: int, args: argparse.Namespace) -> EvalResult:
    """The scores at one length, from their file if they are there."""
    questions = QuestionConfig(samples, prose=(args.books,), qa_1=args.squad if "ruler_qa_1" in tasks else None)
    evals = EvalConfig(tasks=tasks, lengths=(length,), questions=questions, zero_shot=())
    kind = {SHORT: "short", RULER: "ruler", (SINGLE,): "single"}[tasks]
    return evaluated(model, evals, f"{kind}-{length}-{samples}-{name.replace(' ', '_')}", args.workdir)


def joined(found: list[EvalResult]) -> EvalResult:
    """Results at several lengths as one."""
    return dataclasses.replace(found[0], rows=tuple(row for result in found for row in result.rows if row.metric == "score"))


def ruler_table(found: dict[str, EvalResult]) -> str:
    """A line for each task, and their average."""
    columns = [(name, length) for name in MODELS for length in found[name].values("length")]
    whole = {
        name: dataclasses.replace(result, rows=tuple(average(result.rows, "average", RULER))) for name, result in found.items()
    }

    def line(task: str, results: dict[str, EvalResult]) -> tuple[str, ...]:
        values = {name: result.select(task=task).by_length() for name, result in results.items()}
        return task, *(percent(values[name][length]) for name, length in columns)

    lines = [*(line(task, found) for task in RULER), line("average", whole)]
    return markdown.table(("", *(f"{name}, {length:,}" for name, length in columns)), lines)


def short_table(found: dict[str, EvalResult]) -> str:
    """A line for each task, with the paired difference and its interval."""
    compared = comparison.compare(found["as it is"], found["extended"], "none")
    lines = [(row.task, row.shown(row.before), row.shown(row.after), row.gap, row.verdict) for row in compared]
    return markdown.table(("", *MODELS, "difference [95%]", ""), lines)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="files of plain text, as a pattern")
    parser.add_argument("--squad", required=True, help="a file of questions, laid out like SQuAD's")
    parser.add_argument("--workdir", type=Path, required=True, help="of the extended model")
    parser.add_argument("--samples", type=int, default=1, help="of each RULER task at each length")
    parser.add_argument("--needle_samples", type=int, default=2, help="of a single needle at each depth")
    parser.add_argument("--short_samples", type=int, default=5, help="of each short task; 0 leaves them out")
    parser.add_argument("--lengths", type=int, nargs="+", default=(4096, 16384), help="of RULER, for the extended model")
    parser.add_argument("--lengths_before", type=int, nargs="+", default=(4096,), help="the same, for the model as it is")
    parser.add_argument("--needle_lengths", type=int, nargs="+", default=(4096, 8192, 16384, 32768), help="of single needles")
    parser.add_argument("--needle_lengths_before", type=int, nargs="+", default=(4096, 8192, 16384))
    args = parser.parse_args()
    extended = models.load(args.workdir)
    source = models.load(str(extended.run.init_from))
    # Both are computed in the type of the training.
    source = dataclasses.replace(source, run=dataclasses.replace(source.run, execution=extended.run.execution))
    both = dict(zip(MODELS, (source, extended), strict=True))

    def at(tasks: tuple[str, ...], samples: int, *lengths: tuple[int, ...]) -> dict[str, EvalResult]:
        def count(length: int) -> int:
            return samples if length <= WITHIN else 1

        return {
            name: joined([asked(both[name], name, tasks, n, count(n), args) for n in here])
            for name, here in zip(MODELS, lengths, strict=True)
        }

    single = at((SINGLE,), args.needle_samples, args.needle_lengths_before, args.needle_lengths)
    ruler = at(RULER, args.samples, args.lengths_before, args.lengths)
    asks = args.short_samples > 0
    short = {name: asked(model, name, SHORT, SHORT_LENGTH, args.short_samples, args) for name, model in both.items() if asks}
    record = {
        "samples": args.samples,
        "needle_samples": args.needle_samples,
        "short_samples": args.short_samples,
        "needles": {name: plain_rows(result) for name, result in single.items()},
        "ruler": {name: plain_rows(result) for name, result in ruler.items()},
        "short": {name: plain_rows(result) for name, result in short.items()},
    }
    (HERE / "questions.json").write_text(json.dumps(record, indent=1) + "\n")
    style.save(plots.needles(single), HERE / "single_needles.png")
    markdown.fill(HERE / "README.md", "single", length_table(single, percent))
    markdown.fill(HERE / "README.md", "ruler", ruler_table(ruler))
    if short:
        markdown.fill(HERE / "README.md", "short", short_table(short))
    say(f"written to {HERE}")


if __name__ == "__main__":
    main()
