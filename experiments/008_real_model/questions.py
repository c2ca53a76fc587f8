"""RULER, and ten tasks in short texts, asked of SmolLM2-135M-Instruct as it is and extended.

    python experiments/008_real_model/questions.py --books='books/*.txt' --squad=squad.json --workdir=runs/008_real_model

The workdir is that of run.py, --squad a file laid out like SQuAD's. Resumes: what is measured is kept in the workdir, length by
length. --lengths, --lengths_before and --samples choose how long it takes: on two cores with AMX a sample of the twelve tasks takes
two minutes at 4,096 tokens. Writes questions.json and two tables of README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from run import HERE, evaluated

from lcx.core.console import say
from lcx.evals import comparison
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.results import EvalResult, plain_rows
from lcx.evals.tasks.table import GROUPS
from lcx.evals.text.questions import average
from lcx.recipes import models
from lcx.report import markdown
from lcx.training.loading import Loaded

RULER = tuple(name for name in GROUPS["ruler"] if name != "ruler_qa_2")
"""All but the questions that need HotpotQA's file."""
SHORT = (
    "needle_in_prose", "passkey", "key_value", "induction", "many_shot", "session_state", "ruler_niah_single_2",
    "ruler_niah_multikey_1", "ruler_vt", "ruler_qa_1",
)  # fmt: skip
SHORT_LENGTH = 1024
MODELS = ("as it is", "extended")


def asked(model: Loaded, name: str, tasks: tuple[str, ...], length: int, samples: int, args: argparse.Namespace) -> EvalResult:
    """The scores at one length, from their file if they are there."""
    questions = QuestionConfig(samples, prose=(args.books,), qa_1=args.squad)
    evals = EvalConfig(tasks=tasks, lengths=(length,), questions=questions, zero_shot=())
    kind = "short" if tasks == SHORT else "ruler"
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
        return task, *(f"{100 * values[name][length]:.0f}%" for name, length in columns)

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
    parser.add_argument("--samples", type=int, default=2, help="of each RULER task at each length")
    parser.add_argument("--short_samples", type=int, default=10, help="of each short task; 0 leaves them out")
    parser.add_argument("--lengths", type=int, nargs="+", default=(4096, 16384))
    parser.add_argument("--lengths_before", type=int, nargs="+", default=(4096,))
    args = parser.parse_args()
    extended = models.load(args.workdir)
    source = models.load(str(extended.run.init_from))
    # Both are computed in the type of the training.
    source = dataclasses.replace(source, run=dataclasses.replace(source.run, execution=extended.run.execution))
    both = dict(zip(MODELS, (source, extended), strict=True))
    lengths = dict(zip(MODELS, (args.lengths_before, args.lengths), strict=True))
    ruler = {
        name: joined([asked(model, name, RULER, length, args.samples, args) for length in lengths[name]])
        for name, model in both.items()
    }
    asks = args.short_samples > 0
    short = {name: asked(model, name, SHORT, SHORT_LENGTH, args.short_samples, args) for name, model in both.items() if asks}
    record = {
        "samples": args.samples,
        "short_samples": args.short_samples,
        "ruler": {name: plain_rows(result) for name, result in ruler.items()},
        "short": {name: plain_rows(result) for name, result in short.items()},
    }
    (HERE / "questions.json").write_text(json.dumps(record, indent=1) + "\n")
    markdown.fill(HERE / "README.md", "ruler", ruler_table(ruler))
    if short:
        markdown.fill(HERE / "README.md", "short", short_table(short))
    say(f"written to {HERE}")


if __name__ == "__main__":
    main()
