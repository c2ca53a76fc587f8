"""Does the critical base hold for a pretrained model? SmolLM2-135M-Instruct at 16,384 tokens under multiples of it.

    python experiments/008_real_model/thetas.py --books='books/*.txt' --workdir=runs/008_thetas

Every theta is trained on the same rows, in the same order, from the same weights. Two CPU cores, 20 minutes a theta.
Resumes: what is trained and measured is kept in the workdir. Writes thetas.json, thetas.png and the table of README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from matplotlib.ticker import MaxNLocator
from run import HERE, TRAINED, completed, evaluated, on_books

from lcx.core.console import say
from lcx.evals.results import perplexity, plain_rows
from lcx.positions.theta import critical_base
from lcx.recipes import models
from lcx.recipes.recipe import recipe
from lcx.report import markdown, style
from lcx.training import metrics
from lcx.training.loop import train
from lcx.training.monitor import curve

THETA, TARGET = 1e5, 16384
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)


def configured(args: argparse.Namespace, multiple: float):
    """The config of configs/real_model.py for one theta."""
    config = on_books(args)
    config.target, config.theta = TARGET, multiple * critical_base(THETA, TRAINED, TARGET)
    config.optim.schedule, config.optim.warmup_steps = "constant", 5
    config.checkpoint.every = None
    return completed(config)


def measured(args: argparse.Namespace, multiple: float) -> dict:
    """Train and evaluate one theta, unless that is done; what is kept of it."""
    chosen, folder = recipe(configured(args, multiple)), args.workdir / f"theta_{multiple:g}"
    train(chosen.run, folder, given=models.initial_weights(chosen.run.init_from))
    rows = []
    for task, label in (("perplexity", "perplexity"), ("needle_in_prose", f"needles_{args.samples}")):
        result = evaluated(folder, dataclasses.replace(chosen.evals, tasks=(task,)), label, folder)
        rows += plain_rows(result.select(task=task))
    steps = [dict(row["loss_by_part"]) for row in metrics.read(folder / "metrics.jsonl")]
    return {
        "multiple": multiple,
        "theta": float(chosen.run.stages[-1].positions["global"]),
        "steps": steps,
        "rows": rows,
    }


def by_length(rows: list[dict], task: str, metric: str) -> dict[int, float]:
    """Mean over depths of one metric by length."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["task"], row["metric"]) == (task, metric):
            found.setdefault(row["length"], []).append(row["value"])
    return {length: sum(values) / len(values) for length, values in found.items()}


def lines(results: list[dict]) -> list[tuple[str, ...]]:
    """A line of the table for each theta."""
    table = []
    for one in results:
        texts = [step["text"] for step in one["steps"] if "text" in step]
        shape = curve(texts)
        nll, needles = by_length(one["rows"], "perplexity", "nll"), by_length(one["rows"], "needle_in_prose", "score")
        table.append(
            (
                f"{one['multiple']:g}",
                f"{one['theta']:,.0f}",
                f"{shape.fall:.2f}",
                f"{shape.up_pairs:.2f}",
                *(f"{perplexity(value):.2f}" for value in nll.values()),
                *(f"{100 * value:.0f}%" for value in needles.values()),
            )  # fmt: skip
        )
    return table


@style.typography()
def draw(results: list[dict]) -> None:
    """Loss of text in training, each step's above the lowest of all thetas; perplexity and needles at the end."""
    figure = style.new_figure(11.0, 4.2)
    early, end, found = figure.subplots(1, 3)
    for colour, one in zip(style.LINES, results, strict=False):
        early.plot(*zip(*above(results, one), strict=True), color=colour, label=f"{one['multiple']:g} × critical base")
    early.xaxis.set_major_locator(MaxNLocator(integer=True))
    early.set_xlabel("step")
    early.set_title("Loss of text above the lowest, nats")
    early.legend(frameon=False, fontsize=9)
    multiples = [one["multiple"] for one in results]
    for axes, task, metric, title, shown in (
        (end, "perplexity", "nll", "Perplexity of books", perplexity),
        (found, "needle_in_prose", "score", "Needles found in prose, %,", lambda value: 100 * value),
    ):
        values = [by_length(one["rows"], task, metric) for one in results]
        for colour, length in zip(style.LINES, values[0], strict=False):
            axes.plot(multiples, [shown(row[length]) for row in values], color=colour, marker="o", label=style.tokens(length))
        axes.set_xscale("log", base=2)
        axes.set_xticks(multiples, [f"{x:g}" for x in multiples])
        axes.set_xlabel("theta, multiples of the critical base")
        axes.set_title(f"{title} at {style.tokens(next(iter(values[0])))}" if len(values[0]) == 1 else title)
        if len(values[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
    found.set_ylim(-3, 103)
    style.save(figure, HERE / "thetas.png")


def above(results: list[dict], one: dict) -> list[tuple[int, float]]:
    """(step, loss of text above the lowest of all thetas at that step), where a step has rows of text."""
    out = []
    for at, step in enumerate(one["steps"]):
        if "text" in step:
            out.append((at + 1, step["text"] - min(other["steps"][at]["text"] for other in results)))
    return out


def main() -> None:
    """Trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="files of plain text, as a pattern")
    parser.add_argument("--workdir", type=Path, default=Path("runs/008_thetas"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens_per_step", type=int, default=4096)
    parser.add_argument("--multiples", type=float, nargs="+", default=MULTIPLES)
    parser.add_argument("--samples", type=int, default=1, help="texts of needles at each length")
    parser.add_argument("--perplexity_tokens", type=int, default=1 << 14, help="tokens of held-out text at each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=(16384,))
    args = parser.parse_args()
    results = [measured(args, multiple) for multiple in args.multiples]
    settings = {key: value for key, value in vars(args).items() if key not in ("books", "workdir", "multiples")}
    (HERE / "thetas.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    head = ["× critical", "theta", "fall", "up-pairs"]
    head += [f"{what} at {n:,}" for what in ("perplexity", "needles") for n in args.lengths]
    markdown.fill(HERE / "README.md", "thetas", markdown.table(head, lines(results)))
    draw(results)
    say(f"written to {HERE}")


if __name__ == "__main__":
    main()
