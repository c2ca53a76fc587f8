"""Schemes for eight times the length: the sweep (what is finished is not run again), the same zero-shot, figure and README.

    make quickstart && python experiments/002_schemes/run.py

Writes results.json, results.csv, zero_shot.json, schemes.png and the tables of README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcx.evals import results
from lcx.evals.results import EvalResult, perplexity
from lcx.evals.statistics import wilson
from lcx.recipes.recipe import evaluate_loaded, recipe
from lcx.report import markdown, style
from lcx.training.loading import load_params

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SWEEP = ROOT / "configs" / "sweeps" / "schemes.py"


def zero_shot(module: Mapping, workdir: Path) -> EvalResult:
    """Every scheme on the base model as it is; evaluated once and kept in the sweep's folder."""
    kept = workdir / "eval" / "zero_shot.json"
    config = module["get_config"]()
    config.evals.zero_shot = tuple(module["specs"]())
    config.evals.zero_shot_items = recipe(config).evals.needle_items
    chosen = recipe(config)
    if not kept.exists():
        evaluate_loaded(load_params(chosen.run.init_from), chosen.evals, "zero_shot", workdir)
    return results.read(kept)


def rows_of(found: Sequence[dict], before: EvalResult, module: Mapping) -> list[dict]:
    """Scheme, needles and perplexity by length, before and after the extension."""
    evals = recipe(module["get_config"]()).evals
    items = evals.needle_items * len(evals.depths)
    rows = []
    for result in found:
        if result["status"] != "finished":
            continue
        (spec,) = result["overrides"].values()
        # "none" is the same as plain rotary: the base model as it is.
        grid, curve = before.select(task="needles", scheme=spec), before.select(metric="nll", scheme=spec)
        after = {int(n): share for n, share in result["numbers"]["needles_by_length"].items()}
        rows.append(
            {
                "scheme": spec, "before": grid.by_length(), "after": after, "items": items,
                "perplexity_before": {length: perplexity(nll) for length, nll in curve.by_length().items()},
                "perplexity_after": {int(n): value for n, value in result["numbers"]["perplexity_by_length"].items()},
                "loss": result["numbers"]["loss"],
            }
        )  # fmt: skip
    return rows


@style.typography()
def draw(rows: Sequence[dict], path: Path) -> None:
    """Needles by length under each scheme, zero-shot and after the extension, best first."""
    longest = max(rows[0]["after"])
    rows = sorted(rows, key=lambda row: (-row["after"][longest], -row["before"][longest]))
    lengths = sorted(rows[0]["after"])
    figure = style.new_figure(10.0, 1.3 + 0.36 * len(rows))
    for i, (axes, key, title) in enumerate(
        zip(
            figure.subplots(1, 2),
            ("before", "after"),
            ("Zero-shot: needles found, %", "After the extension: needles found, %"),
            strict=True,
        )
    ):
        values = [[100 * row[key][n] for n in lengths] for row in rows]
        image = axes.imshow(values, cmap=style.SCORES, vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                colour = style.ink_on(image.cmap(image.norm(value)))
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9.5, color=colour)
        for edge in range(1, len(lengths)):
            axes.axvline(edge - 0.5, color=style.PAPER, linewidth=2)
        for edge in range(1, len(rows)):
            axes.axhline(edge - 0.5, color=style.PAPER, linewidth=2)
        axes.set_xticks(range(len(lengths)), [style.tokens(n) for n in lengths])
        axes.set_yticks(range(len(rows)), [row["scheme"] for row in rows] if i == 0 else [""] * len(rows))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("evaluation length")
        axes.set_title(title)
    style.save(figure, path)


def table(rows: Sequence[dict]) -> str:
    """The schemes as a Markdown table, best first."""
    longest, shortest = max(rows[0]["after"]), min(rows[0]["after"])
    header = [
        "scheme", f"zero-shot at {longest:,}", f"after, at {longest:,} (95% interval)", f"after, at {shortest:,}",
        f"perplexity at {longest:,}, zero-shot", "after",
    ]  # fmt: skip
    lines = []
    for row in sorted(rows, key=lambda row: (-row["after"][longest], -row["before"][longest])):
        low, high = wilson(round(row["after"][longest] * row["items"]), row["items"])
        lines.append(
            [
                f"`{row['scheme']}`", f"{100 * row['before'][longest]:.0f}%",
                f"{100 * row['after'][longest]:.0f}% ({100 * low:.0f}–{100 * high:.0f})", f"{100 * row['after'][shortest]:.0f}%",
                f"{row['perplexity_before'][longest]:.2f}", f"{row['perplexity_after'][longest]:.2f}",
            ]
        )  # fmt: skip
    return markdown.table(header, lines)


def findings(rows: Sequence[dict]) -> str:
    """Best and worst, and what the extension is worth."""
    longest, shortest = max(rows[0]["after"]), min(rows[0]["after"])
    order = sorted(rows, key=lambda row: row["after"][longest], reverse=True)
    first = max(rows, key=lambda row: row["before"][longest])
    gain = max(rows, key=lambda row: row["after"][longest] - row["before"][longest])
    low, _ = wilson(round(order[0]["after"][longest] * order[0]["items"]), order[0]["items"])
    below = [row["scheme"] for row in order if wilson(round(row["after"][longest] * row["items"]), row["items"])[1] < low]
    lost = [f"`{row['scheme']}` ({100 * row['after'][shortest]:.0f}%)" for row in rows if row["after"][shortest] < 0.85]
    return "\n".join(
        [
            f"- Zero-shot, `{first['scheme']}` finds most at {longest:,}: {100 * first['before'][longest]:.0f}%.",
            f"- After the extension `{order[0]['scheme']}` finds most ({100 * order[0]['after'][longest]:.0f}%); with "
            f"{order[0]['items']} needles a length only these are surely worse: "
            f"{', '.join(f'`{name}`' for name in below) or 'none'}.",
            f"- `{gain['scheme']}` gains most: {100 * gain['before'][longest]:.0f}% to {100 * gain['after'][longest]:.0f}%.",
            f"- Below 85% at the base model's own length after the extension: {', '.join(lost) or 'none'}.",
        ]
    )


def main() -> None:
    """The sweep and the zero-shot evaluation, then what is made of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/schemes")
    workdir = Path(parser.parse_args().workdir)
    subprocess.run([sys.executable, "-m", "lcx.cli", "sweep", f"--config={SWEEP}", f"--workdir={workdir}"], check=True)
    module = runpy.run_path(str(SWEEP))
    before = zero_shot(module, workdir)
    for name in ("results.json", "results.csv", "eval/zero_shot.json"):
        shutil.copyfile(workdir / name, HERE / Path(name).name)
    rows = rows_of(json.loads((HERE / "results.json").read_text()), before, module)
    draw(rows, HERE / "schemes.png")
    markdown.fill(HERE / "README.md", "table", table(rows))
    picture = "![Needles by scheme and length, zero-shot and after the extension](schemes.png)"
    markdown.fill(HERE / "README.md", "findings", f"{picture}\n\n{findings(rows)}")


if __name__ == "__main__":
    main()
