"""AdamW and Muon on the quickstart at equal tokens: the sweep (what is finished is not run again), the figure and the README.

    python experiments/009_optimizers/run.py

Writes results.json, losses.png and the table of README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lcx.report import history, markdown, style

HERE = Path(__file__).parent
SWEEP = HERE.parents[1] / "configs" / "sweeps" / "optimizers.py"
COLORS = {"adamw": style.LINES[0], "muon": style.LINES[1]}
SMOOTHED = 15
"""Steps over which a drawn loss is the running median."""


def row_of(point: dict, workdir: Path) -> dict:
    """What a point found: needles and perplexity by length, and every stage's tokens and losses."""
    stages = [stage for stage in history.load(workdir / "points" / point["name"]).stages() if stage.curve.kept]
    return {
        "optimizer": point["overrides"]["optim.name"],
        "seed": point["overrides"]["seed"],
        "needles": point["numbers"]["needles_by_length"],
        "perplexity": point["numbers"]["perplexity_by_length"],
        "stages": [
            {
                "name": stage.curve.name,
                "tokens": stage.tokens,
                "losses": stage.curve.loss,
                "final_loss": stage.final_loss,
            }
            for stage in stages
        ],
    }


def spread(values: Iterable[float], form: str) -> str:
    """The mean, with the lowest and the highest."""
    values = list(values)
    return f"{statistics.mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def quality(rows: Sequence[dict]) -> str:
    """Needles and perplexity of both optimizers as a Markdown table."""
    lengths = list(rows[0]["needles"])
    long = lengths[-1]
    header = ["optimizer", *(f"needles at {int(n):,}, %" for n in lengths), f"perplexity at {int(long):,}"]
    lines = []
    for name, own in by_optimizer(rows).items():
        needles = [spread((100 * row["needles"][n] for row in own), ".0f") for n in lengths]
        lines.append([name, *needles, spread((row["perplexity"][long] for row in own), ".3f")])
    return markdown.table(header, lines)


def losses(rows: Sequence[dict]) -> str:
    """Mean loss over the last tenth of each stage, of both optimizers, as a Markdown table."""
    both = by_optimizer(rows)
    header = ["stage", "million tokens", *(f"loss at its end, {name}" for name in both)]
    lines = []
    for i, stage in enumerate(rows[0]["stages"]):
        ends = [spread((row["stages"][i]["final_loss"] for row in own), ".3f") for own in both.values()]
        lines.append([f"`{stage['name']}`", f"{stage['tokens'] / 1e6:.2f}", *ends])
    return markdown.table(header, lines)


def by_optimizer(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The points of each optimizer."""
    return {name: [row for row in rows if row["optimizer"] == name] for name in COLORS}


@style.typography()
def draw(rows: Sequence[dict], path: Path) -> None:
    """The loss of every point over its tokens, stage by stage."""
    figure = style.new_figure(10.0, 3.6)
    stages = rows[0]["stages"]
    for i, (axes, stage) in enumerate(zip(figure.subplots(1, len(stages)), stages, strict=True)):
        for row in rows:
            values = row["stages"][i]["losses"]
            smooth = [statistics.median(values[max(0, at - SMOOTHED + 1) : at + 1]) for at in range(len(values))]
            per_step = row["stages"][i]["tokens"] / len(values) / 1e6
            label = row["optimizer"] if i == 0 and row["seed"] == rows[0]["seed"] else None
            steps = [per_step * (at + 1) for at in range(len(values))]
            axes.plot(steps, smooth, color=COLORS[row["optimizer"]], linewidth=1.4, alpha=0.85, label=label)
        style.grid_lines(axes)
        late = [value for row in rows for value in row["stages"][i]["losses"][SMOOTHED:]]
        style.value_axis(axes, min(late), max(late), f"training loss, median of {SMOOTHED} steps" if i == 0 else "")
        axes.set_title(stage["name"])
        axes.set_xlabel("million tokens")
        if i == 0:
            axes.legend(frameon=False)
    style.save(figure, path)


def main() -> None:
    """The sweep, then what is made of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--show", action="store_true", help="only make the figure and the tables of results.json again")
    args = parser.parse_args()
    kept = HERE / "results.json"
    if not args.show:
        subprocess.run([sys.executable, "-m", "lcx.cli", "sweep", f"--config={SWEEP}", f"--workdir={args.workdir}"], check=True)
        points = json.loads((args.workdir / "results.json").read_text())
        rows = [row_of(point, args.workdir) for point in points if point["status"] == "finished"]
        kept.write_text(json.dumps(rows) + "\n")
    rows = json.loads(kept.read_text())
    draw(rows, HERE / "losses.png")
    markdown.fill(HERE / "README.md", "quality", quality(rows))
    markdown.fill(HERE / "README.md", "losses", losses(rows))


if __name__ == "__main__":
    main()
