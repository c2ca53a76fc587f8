"""Theta against length: run the sweep (what is finished is not run again), then draw the figure and fill in the README.

    make quickstart && python experiments/001_theta_length/run.py

Writes results.json, results.csv, theta_length.png and the tables of README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lcx.evals.statistics import wilson
from lcx.positions.theta import critical_base, ntk_base
from lcx.recipes.recipe import recipe
from lcx.report import markdown, style

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SWEEP = ROOT / "configs" / "sweeps" / "theta_length.py"


def rows_of(results: Sequence[dict], module: dict) -> list[dict]:
    """What the figure and the table show of each finished point."""
    base, trained, head_dim = (module["QUICKSTART"][name] for name in ("BASE_THETA", "BASE_LENGTH", "MODEL"))
    head_dim = head_dim["head_dim"]
    evals = recipe(module["get_config"]()).evals
    items, rows = evals.needle_items * len(evals.depths), []
    for result in results:
        if result["status"] != "finished":
            continue
        length, theta = (result["overrides"][f"stages.extend.{path}"] for path in ("seq_len", "positions.default"))
        critical, numbers = critical_base(base, trained, length), result["numbers"]
        notes = {
            round(base): "unchanged",
            round(critical): "critical",
            round(ntk_base(base, length / trained, head_dim)): "NTK-aware",
        }
        shares = {int(n): share for n, share in numbers["needles_by_length"].items()}
        rows.append(
            {
                "length": length, "theta": theta, "ratio": theta / critical, "note": notes.get(round(theta), ""), "shares": shares,
                "found": shares[length], "interval": wilson(round(shares[length] * items), items),
                "perplexity": numbers["perplexity_by_length"][str(length)], "loss": numbers["loss"],
            }
        )  # fmt: skip
    return rows


@style.typography()
def draw(rows: Sequence[dict], path: Path) -> None:
    """Needles at the new length, and held-out perplexity there, against theta as a multiple of the critical base."""
    figure = style.new_figure(11.0, 4.6)
    needles, perplexity = figure.subplots(1, 2)
    for colour, length in zip(style.LINES, sorted({row["length"] for row in rows}), strict=False):
        line = sorted((row for row in rows if row["length"] == length), key=lambda row: row["theta"])
        ratios = [row["ratio"] for row in line]
        bars = [[100 * abs(row["found"] - row["interval"][end]) for row in line] for end in (0, 1)]
        label = f"extended to {style.tokens(length)}"
        needles.errorbar(
            ratios, [100 * row["found"] for row in line], bars, color=colour, marker="o", markersize=5, elinewidth=1, label=label
        )
        # Each length is read on text of its own, so that only what theta changes can be compared.
        lowest = min(row["perplexity"] for row in line)
        excess = [100 * (row["perplexity"] / lowest - 1) for row in line]
        perplexity.plot(ratios, excess, color=colour, marker="o", markersize=5)
        for row in line:
            if row["note"] == "NTK-aware":
                needles.plot(
                    row["ratio"], 100 * row["found"], "D", color=style.PAPER, markeredgecolor=colour, markersize=8, zorder=5
                )
            if row["note"] == "unchanged":
                needles.plot(
                    row["ratio"], 100 * row["found"], "s", color=style.PAPER, markeredgecolor=colour, markersize=8, zorder=5
                )
    for axes in (needles, perplexity):
        axes.set_xscale("log")
        axes.set_xticks([0.01, 0.02, 0.1, 0.25, 0.5, 1, 2], ["0.01", "0.02", "0.1", "0.25", "0.5", "1", "2"])
        axes.minorticks_off()
        axes.axvline(1.0, color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xlabel("theta, in critical bases of the length")
        style.grid_lines(axes)
    needles.set_ylim(-3, 103)
    needles.set_title("Needles found at the new length, %")
    needles.plot([], [], "s", color=style.PAPER, markeredgecolor=style.MUTED, markersize=8, label="theta unchanged")
    needles.plot([], [], "D", color=style.PAPER, markeredgecolor=style.MUTED, markersize=8, label="NTK-aware theta")
    needles.legend(frameon=False, loc="best")
    perplexity.set_title("Held-out perplexity, % above the best theta's")
    style.save(figure, path)


def table(rows: Sequence[dict]) -> str:
    """The points as a Markdown table."""
    short = min(rows[0]["shares"])
    header = [
        "extended to",
        "theta",
        "× critical",
        "",
        "needles there (95% interval)",
        f"needles at {short:,}",
        "perplexity there",
        "loss",
    ]
    lines = []
    for row in rows:
        low, high = row["interval"]
        lines.append(
            [
                f"{row['length']:,}", f"{row['theta']:,.0f}", f"{row['ratio']:.2g}", row["note"],
                f"{100 * row['found']:.0f}% ({100 * low:.0f}–{100 * high:.0f})", f"{100 * row['shares'][short]:.0f}%",
                f"{row['perplexity']:.3f}", f"{row['loss']:.3f}",
            ]
        )  # fmt: skip
    return markdown.table(header, lines)


def findings(rows: Sequence[dict]) -> str:
    """The best theta of each length, and where needles and perplexity part."""
    lines = []
    for length in sorted({row["length"] for row in rows}):
        line = [row for row in rows if row["length"] == length]
        best, lowest = max(line, key=lambda row: row["found"]), min(line, key=lambda row: row["perplexity"])
        level = [f"{row['ratio']:.2g}" for row in line if row["interval"][1] >= best["interval"][0]]
        low = next(row for row in line if row["note"] == "NTK-aware")
        text = (
            f"- To {length:,}: most needles, {100 * best['found']:.0f}%, at {best['ratio']:.2g} × the critical base; "
            f"the 95% intervals at {', '.join(level)} × overlap.",
            f"NTK-aware ({low['ratio']:.2g} ×): {100 * low['found']:.0f}%.",
            f"Perplexity is lowest at {lowest['ratio']:.2g} ×, where {100 * lowest['found']:.0f}% are found.",
        )
        lines.append(" ".join(text))
    return "\n".join(lines)


def main() -> None:
    """The sweep, then what is made of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/theta_length")
    workdir = Path(parser.parse_args().workdir)
    subprocess.run([sys.executable, "-m", "lcx.cli", "sweep", f"--config={SWEEP}", f"--workdir={workdir}"], check=True)
    for name in ("results.json", "results.csv"):
        shutil.copyfile(workdir / name, HERE / name)
    rows = rows_of(json.loads((HERE / "results.json").read_text()), runpy.run_path(str(SWEEP)))
    draw(rows, HERE / "theta_length.png")
    markdown.fill(HERE / "README.md", "table", table(rows))
    markdown.fill(HERE / "README.md", "findings", findings(rows))


if __name__ == "__main__":
    main()
