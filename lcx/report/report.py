"""One self-contained report.html per run, written from the files in its workdir and nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from lcx.core.files import write_atomically
from lcx.evals.results import EvalResult, NeedleGrid, PerplexityCurve, wilson
from lcx.report import history, plots, style
from lcx.report.history import Run, Stage
from lcx.report.page import page

Cell = str | tuple[str, str]


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Write `report.html` and `plots/*.png` from what the workdir holds; may be called again at any time.

    Raises `UserError` when the workdir holds nothing to report.
    """
    workdir = pathlib.Path(workdir)
    run = history.load(workdir)
    figures = pictures(run)
    for name, figure in figures.items():
        style.save(figure, workdir / "plots" / f"{name}.png")
    return write_atomically(workdir / "report.html", render(run, figures))


def pictures(run: Run) -> dict[str, Figure]:
    """The figures that the run has data for, by file name."""
    figures: dict[str, Figure] = {}
    grids, curves, stages = needle_grids(run), perplexity_curves(run), [stage.curve for stage in run.stages()]
    if len(grids) == 2 and stages:
        (first, before), (second, after) = grids.items()
        figures["summary"] = plots.summary(before, after, curves, stages, (f"Needles found {first.lower()}", second))
    if grids:
        figures["needles"] = plots.needles(grids)
    if curves:
        trained = run.before.trained if run.before else run.after.trained if run.after else None
        figures["perplexity"] = plots.perplexity(curves, trained)
        few = {name: curve for name, curve in curves.items() if name in ("none", "yarn", "extended") or len(curves) < 4}
        figures["positions"] = plots.positions(few, trained)
    if stages:
        figures["loss"] = plots.losses(stages)
    return figures


def needle_grids(run: Run) -> dict[str, NeedleGrid]:
    """Grids of the checkpoints' own scheme, before and after, titled."""
    grids: dict[str, NeedleGrid] = {}
    before, after = run.before, run.after
    if before and (grid := before.grid()):
        grids[f"Before: trained at {style.tokens(before.trained)}"] = grid
    if after and (grid := after.grid()):
        factor = f"extended {_factor(after.trained / before.trained)} to" if before else "trained at"
        grids[f"After: {factor} {style.tokens(after.trained)}"] = grid
    return grids


def perplexity_curves(run: Run) -> dict[str, PerplexityCurve]:
    """The base checkpoint under every scheme tried, then the extended one as `extended`."""
    base = run.before or run.after
    curves = {scheme_name(curve.scheme): curve for curve in base.perplexity} if base else {}
    if run.before and run.after and (curve := run.after.curve()):
        curves["extended"] = curve
    return curves


def scheme_name(spec: str) -> str:
    """A short name for a line: `rope:theta=critical` is what people call changing theta."""
    return "theta" if spec == "rope:theta=critical" else spec


def render(run: Run, figures: dict[str, Figure]) -> str:
    """The whole HTML document."""
    images = {name: _image(figure, name) for name, figure in figures.items()}
    zero_shot = _zero_shot(run)
    sections = [
        ("Needles", images.get("needles", ""), _needle_note(run)),
        ("Perplexity", images.get("perplexity", ""), _perplexity_note(run)),
        ("Stages", images.get("loss", "") + _stage_table(run.stages()), ""),
        ("Zero-shot: other schemes on the model before extension", zero_shot, ""),
        (
            "Loss by position",
            images.get("positions", ""),
            "Means over held-out windows of the longest length, in logarithmic bins.",
        ),
        ("Reproduce", _reproduce(run), ""),
    ]
    body = "".join(
        f"<section><h2>{html.escape(title)}</h2>{content}{f'<p class=note>{note}</p>' if note else ''}</section>"
        for title, content, note in sections
        if content
    )
    title, lead = _headline(run)
    return page(title=f"{run.name}: {title}", heading=title, lead=lead, tiles=_tiles(run), body=body)


def _headline(run: Run) -> tuple[str, str]:
    before, after, stages = run.before, run.after, run.stages()
    if before and after:
        how = f"Context extended {_factor(after.trained / before.trained)} in {_stages(stages, above=before.trained)}."
        return f"{before.trained:,} → {after.trained:,} tokens", f"{how} Run {run.name}."
    longest = after.trained if after else max((stage.curve.length for stage in stages), default=0)
    return f"{longest:,} tokens", f"{_stages(stages)}. Run {run.name}."


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(caption, value, small print) of the key figures."""
    tiles: list[tuple[str, str, str]] = []
    before, after = run.before, run.after
    if after and (grid := after.grid()):
        above = before.trained if before else 0
        low, high = grid.interval(above=above)
        small = f"95% interval {100 * low:.0f}–{100 * high:.0f}%; worst cell {_percent(grid.worst(above))}"
        old = before.grid() if before else None
        value = _percent(grid.mean(above)) if old is None else f"{_percent(old.mean(above))} → {_percent(grid.mean(above))}"
        tiles.append((f"needles beyond {above:,} tokens" if above else "needles found", value, small))
        threshold = _threshold(after)
        values = [g.effective_length(threshold) for g in (old, grid) if g is not None]
        small = f"longest with more than {_percent(threshold)} of needles"
        tiles.append(("effective length", " → ".join(f"{v:,}" for v in values), small))
    if after and (curve := after.curve()):
        point = curve.points[-1]
        old_curve = before.curve() if before else None
        values = [c.points[-1].perplexity for c in (old_curve, curve) if c is not None]
        first = curve.points[0]
        small = f"{style.number(first.perplexity)} at {first.length:,}; {curve.bits_per_byte(point.length):.3f} bits per byte"
        tiles.append((f"perplexity at {point.length:,}", " → ".join(style.number(v) for v in values), small))
    stages = run.stages()
    if stages:
        seconds, tokens = sum(s.seconds for s in stages), sum(s.tokens for s in stages)
        steps = sum(len(stage.curve.steps) for stage in stages)
        tiles.append(("training", _duration(seconds), f"{style.number(tokens)} tokens, {steps:,} steps"))
    return tiles


def _needle_note(run: Run) -> str:
    grid = run.after.grid() if run.after else None
    if grid is None:
        return ""
    method = {"teacher_forced": "every answer token is the most likely one given all before it", "generation": "greedy generation"}
    rows = [g for result in run.evals for g in result.needles if g.method == "generation"]
    extra = "".join(f" By generation at {g.trained:,}: {_percent(g.mean())} of {g.items} a cell." for g in rows if g.trained)
    return html.escape(
        f"Share of needles found, of {grid.items} in each cell, with fresh keys and values in held-out text. "
        f"Found means: {method.get(grid.method, grid.method)}. Lengths include the answer. "
        f"The 95% interval of a cell is ±{100 * _half(wilson(grid.items // 2, grid.items)):.0f} points at its widest.{extra}"
    )


def _perplexity_note(run: Run) -> str:
    curve = run.after.curve() if run.after else None
    if curve is None:
        return ""
    strides = {point.stride == point.length for point in curve.points}
    stride = "the whole window" if strides == {True} else "up to " + f"{max(p.stride for p in curve.points):,} tokens"
    last = ", ".join(f"{p.length:,}: {p.final_perplexity:.4g}" for p in curve.points)
    joined = " Held-out documents were joined, since none is that long." if curve.joined else ""
    first = curve.points[0]
    return html.escape(
        f"The same {first.tokens:,} held-out tokens at each length; the window is the length, and it moves on by {stride}; "
        f"weighted by token. Extended model on the last {first.final_tokens:,} of them, which see the full window: {last}.{joined}"
    )


def _stage_table(stages: Sequence[Stage]) -> str:
    rows = []
    for stage in stages:
        curve = stage.curve
        said = "; ".join(_decision(d) for d in stage.decisions) or ("" if curve.kept else "rolled back")
        cells = (
            curve.name, f"{curve.length:,}", "–" if curve.theta is None else style.number(curve.theta), f"{len(curve.steps):,}",
            f"{stage.tokens:,}", f"{stage.seconds:,.0f}", f"{stage.final_loss:.3f}", said,
        )  # fmt: skip
        rows.append((cells, "" if curve.kept else "dim"))
    heads = ("stage", "length", "theta", "steps", "tokens", "seconds", "final loss", "monitor")
    return f"<div class=words>{_table(heads, rows)}</div>" if rows else ""


def _decision(row: Any) -> str:
    verdict = str(row.get("verdict") or row.get("decision") or "")
    reason = str(row.get("reason") or "")
    return f"{verdict}: {reason}" if verdict and reason else verdict or reason


def _zero_shot(run: Run) -> str:
    base = run.before or run.after
    if base is None or len(base.perplexity) < 2:
        return ""
    lengths = [point.length for point in base.perplexity[0].points]
    curves = perplexity_curves(run)
    rows = []
    for name, curve in curves.items():
        source = run.after if name == "extended" else base
        grid = source.grid("none" if name == "extended" else curve.scheme) if source else None
        shares = grid.by_length() if grid else {}
        cells: list[Cell] = [name]
        for length in lengths:
            value = next((style.number(p.perplexity) for p in curve.points if p.length == length), "–")
            cells.append((value, f"{100 * shares[length]:.0f}%") if length in shares else value)
        rows.append((cells, "strong" if name == "extended" else ""))
    note = (
        "Perplexity, with the share of needles found in grey. "
        "The factor of each scheme is length / trained length, chosen at each length unless given."
    )
    return _table(("scheme", *(f"{length:,}" for length in lengths)), rows) + f"<p class=note>{html.escape(note)}</p>"


def _reproduce(run: Run) -> str:
    parts = []
    environment = dict(run.environment)
    if command := environment.pop("command", None):
        parts.append(f"<pre class=command>{html.escape(str(command))}</pre>")
    if environment:
        rows = [((key.replace("_", " "), str(value)), "") for key, value in environment.items()]
        parts.append(f"<div class=words>{_table(('environment', ''), rows)}</div>")
    if run.config:
        text = html.escape(json.dumps(run.config, indent=2))
        parts.append(f"<details><summary>Config</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _table(heads: Sequence[str], rows: Iterable[tuple[Sequence[Cell], str]]) -> str:
    """Rows are (cells, class); a cell is text, or text with a muted note."""

    def inside(cell: Cell) -> str:
        return html.escape(cell) if isinstance(cell, str) else f"{html.escape(cell[0])}<span>{html.escape(cell[1])}</span>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr class='{kind}'>" + "".join(f"<td>{inside(cell)}</td>" for cell in cells) + "</tr>" for cells, kind in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _image(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    with style.typography():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": "lcx"})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='{html.escape(name)}' src='data:image/png;base64,{data}'></figure>"


def _threshold(result: EvalResult) -> float:
    settings = result.settings.get("evals")
    value = settings.get("effective_threshold") if isinstance(settings, dict) else None
    return float(value) if isinstance(value, int | float) else 0.856


def _stages(stages: Sequence[Stage], above: int = 0) -> str:
    count = sum(stage.curve.kept and stage.curve.length > above for stage in stages)
    return f"{count} stage{'' if count == 1 else 's'}"


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


def _factor(value: float) -> str:
    return f"{value:.3g}×"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}".removesuffix(".0") + "%"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
