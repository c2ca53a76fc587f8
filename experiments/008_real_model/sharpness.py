"""Is it attention over too many keys that loses needles? A trained model under temperatures that it was not trained with.

    lcx train --config=configs/real_model.py --config.theta_multiple=4 --workdir=runs/008_theta_4 --config.data.parts...
    python experiments/008_real_model/sharpness.py --books='books/*.txt' --study=theta_4 --workdir=runs/008_theta_4
    python experiments/008_real_model/sharpness.py --books='books/*.txt' --study=own_theta --workdir=runs/008_real_model

The source of the text is that of run.py. Resumes: what is measured is kept in the workdir. An hour each on two cores. Writes
STUDY.json and its table of README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from run import HERE, TARGET, evaluated

from lcx.core.console import say
from lcx.evals.config import EvalConfig, QuestionConfig
from lcx.evals.results import EvalResult, perplexity, plain_rows
from lcx.evals.zero_shot import at_length
from lcx.recipes import models
from lcx.report import markdown
from lcx.training.loading import Loaded
from lcx.training.meta import scheme_configs

SHORTER = (4096, 8192, 16384)
SCALED = "rope:temperature.kind=ministral,temperature.length=2048,temperature.scale="
EIGHTH = "1 + 0.125 ln(1 + ⌊n / 2,048⌋)"
SCHEMES = {
    "as trained": "none",
    "1.27 everywhere": "yarn:factor=1,attention_factor=1.127",
    "ln n / ln 2,048": "rope:temperature.kind=log_n,temperature.length=2048",
    EIGHTH: f"{SCALED}0.125",
    "1 + 0.25 ln(1 + ⌊n / 2,048⌋)": f"{SCALED}0.25",
}
"""What queries are multiplied by -> the scheme that does so."""

NEEDLES, TEXT = "needle_in_prose", "perplexity"


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured of a model: tasks and lengths by scheme, needles in so many texts of each length.

    Perplexities at several lengths are over the same text if they are measured at once.
    """

    texts: int
    measured: dict[str, list[tuple[str, tuple[int, ...]]]]


ALL = [(NEEDLES, SHORTER), (NEEDLES, (TARGET,)), (TEXT, SHORTER), (TEXT, (TARGET,))]
STUDIES = {
    "theta_4": Study(
        1,
        {
            "as trained": [(NEEDLES, SHORTER), (TEXT, SHORTER)],
            "1.27 everywhere": [(NEEDLES, (16384,)), (NEEDLES, (TARGET,)), (TEXT, SHORTER)],
            "ln n / ln 2,048": [(NEEDLES, (16384,)), (NEEDLES, (TARGET,)), (TEXT, (16384,))],
            EIGHTH: [(NEEDLES, (16384,)), (TEXT, SHORTER)],
            "1 + 0.25 ln(1 + ⌊n / 2,048⌋)": [(NEEDLES, (TARGET,))],
        },
    ),
    "own_theta": Study(2, {"as trained": ALL, EIGHTH: ALL}),
}


def measured(loaded: Loaded, name: str, task: str, lengths: tuple[int, ...], args: argparse.Namespace) -> EvalResult:
    """The scores or losses of one task."""
    label = f"{task}_{'-'.join(map(str, lengths))}_{list(SCHEMES).index(name)}"
    schemes = at_length(loaded.schemes, SCHEMES[name], loaded.meta.length, TARGET)
    model = dataclasses.replace(loaded, meta=dataclasses.replace(loaded.meta, positions=scheme_configs(schemes)))
    questions = QuestionConfig(STUDIES[args.study].texts, prose=(args.books,) if task == NEEDLES else ())
    evals = EvalConfig(tasks=(task,), lengths=lengths, questions=questions, perplexity_tokens=max(1 << 14, *lengths))
    return evaluated(model, evals, label, args.workdir).select(task=task, metric="score" if task == NEEDLES else "nll")


def cells(results: list[EvalResult]) -> dict[tuple[str, int], str]:
    """Cells of a line of the table, by task and length."""
    found = {}
    for result in results:
        task = result.rows[0].task
        for length, value in result.by_length().items():
            found[task, length] = f"{100 * value:.0f}%" if task == NEEDLES else f"{perplexity(value):.2f}"
    return found


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="files of plain text, as a pattern")
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--workdir", type=Path, required=True, help="of the trained model")
    args = parser.parse_args()
    loaded = models.load(args.workdir)
    wanted = STUDIES[args.study].measured
    found = {name: [measured(loaded, name, task, lengths, args) for task, lengths in parts] for name, parts in wanted.items()}
    rows = {name: [row for result in results for row in plain_rows(result)] for name, results in found.items()}
    schemes = {name: SCHEMES[name] for name in wanted}
    record = {"theta": float(loaded.schemes["global"].theta), "schemes": schemes, "rows": rows}
    (HERE / f"{args.study}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = {name: cells(results) for name, results in found.items()}
    columns = sorted({column for line in lines.values() for column in line})
    head = ("queries times", *(f"{'needles' if task == NEEDLES else 'perplexity'}, {length:,}" for task, length in columns))
    table = [(name, *(line.get(column, "") for column in columns)) for name, line in lines.items()]
    markdown.fill(HERE / "README.md", args.study, markdown.table(head, table))
    say(f"written to {HERE}")


if __name__ == "__main__":
    main()
