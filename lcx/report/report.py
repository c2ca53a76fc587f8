"""One self-contained report.html per run, written from the files in its workdir and nothing else."""

from __future__ import annotations

import html
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lcx.core.files import write_atomically
from lcx.core.numbers import duration
from lcx.evals.results import EvalResult, perplexity
from lcx.evals.statistics import wilson
from lcx.report import export, history, likelihood, plots, question_plots, questions, retention, scaling, style, time
from lcx.report.history import Run, Stage
from lcx.report.page import Cell, page, picture, sections, table


def write_report(workdir: str | os.PathLike[str], add: Sequence[str | os.PathLike[str]] = ()) -> pathlib.Path:
    """Write `report.html`, `plots/*.png`, and `scores.csv` and `scores.md` of evaluations, from what the workdir holds.

    `add` are result files of other runs to show beside its own. May be called again at any time.

    Raises `UserError` when the workdir holds nothing to report.
    """
    workdir = pathlib.Path(workdir)
    run = history.load(workdir, add)
    figures = pictures(run)
    for name, figure in figures.items():
        style.save(figure, workdir / "plots" / f"{name}.png")
    if run.evals:
        write_atomically(workdir / "scores.csv", export.as_csv(run.evals))
    if text := export.as_markdown(run.evals):
        write_atomically(workdir / "scores.md", text)
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
    named = question_plots.by_scheme(run.evals)
    if len({task for found in named.values() for task in question_plots.scored(found).values("task")}) > 1:
        figures["tasks"] = question_plots.tasks(named)
    for task in dict.fromkeys(task for found in named.values() for task in found.values("task")):
        if (figure := question_plots.growth(task, named)) is not None:
            figures[f"growth_{task}"] = figure
    for task, figure in scaling.curves(run.evals).items():
        figures[f"scaling_{task}"] = figure
    for task, found in questions.grids(run.evals).items():
        figures[f"depths_{task}"] = plots.needles(found)
    if curves:
        trained = run.before.trained if run.before else run.after.trained if run.after else None
        figures["perplexity"] = plots.perplexity(curves, trained)
        few = {name: curve for name, curve in curves.items() if name in ("unchanged", "yarn", "extended") or len(curves) < 4}
        figures["positions"] = plots.positions(few, trained)
    if run.after and (figure := likelihood.kinds(run.before, run.after)) is not None:
        figures["kinds"] = figure
    if stages:
        figures["loss"] = plots.losses(stages)
    if run.goodput is not None and run.goodput.wall:
        figures["time"] = time.bar(run.goodput)
    parts = [stage.parts for stage in run.stages() if stage.curve.kept]
    if len({name for names in parts for name in names}) > 1:
        figures["loss_by_part"] = plots.part_losses(parts)
    return figures


def needle_grids(run: Run) -> dict[str, EvalResult]:
    """Needles under the checkpoints' own scheme, before and after, titled."""
    grids: dict[str, EvalResult] = {}
    before, after = run.before, run.after
    if grid := _needles(before):
        grids[f"Before: trained at {style.tokens(grid.trained)}"] = grid
    if grid := _needles(after):
        factor = f"extended {_factor(grid.trained / before.trained)} to" if before else "trained at"
        grids[f"After: {factor} {style.tokens(grid.trained)}"] = grid
    return grids


def perplexity_curves(run: Run) -> dict[str, EvalResult]:
    """The base checkpoint under every scheme tried, then the extended one as `extended`."""
    losses = _losses(run.before or run.after)
    curves = {plots.scheme_name(spec): losses.select(scheme=spec) for spec in losses.values("scheme")} if losses else {}
    if run.before and (after := _losses(run.after, scheme="none")):
        curves["extended"] = after
    return curves


def _needles(result: EvalResult | None, scheme: str = "none") -> EvalResult | None:
    return None if result is None else result.select(task="needles", scheme=scheme)


def _losses(result: EvalResult | None, **fields: str) -> EvalResult | None:
    return None if result is None else result.select(task="perplexity", **fields)


def render(run: Run, figures: dict[str, Figure]) -> str:
    """The whole HTML document."""
    images = {name: picture(style.png(figure), name) for name, figure in figures.items()}
    zero_shot = _zero_shot(run)
    asked = "".join(image for name, image in images.items() if name.partition("_")[0] in ("tasks", "growth", "scaling", "depths"))
    body = sections(
        [
            ("Needles", images.get("needles", ""), _needle_note(run)),
            ("Questions in words", asked + questions.section(run.evals), ""),
            ("Answers to read", questions.reading(run.answers, [result.label for result in run.evals]), ""),
            (
                "Which tokens gain from context",
                images.get("kinds", "") + likelihood.losses(run.evals),
                likelihood.KINDS_NOTE if "kinds" in images else "",
            ),
            ("Key tokens", likelihood.passages(run.answers), ""),
            ("Short contexts: what the extension cost", retention.section(run.before, run.after), ""),
            ("Perplexity", images.get("perplexity", ""), _perplexity_note(run)),
            ("Stages", images.get("loss", "") + _stage_table(run.stages()), ""),
            ("Parts of the mixture", images.get("loss_by_part", "") + _part_table(run.stages()), _PART_NOTE),
            ("Zero-shot: other schemes on the model before extension", zero_shot, ""),
            (
                "Loss by position",
                images.get("positions", ""),
                "Means over held-out windows of the longest length, in logarithmic bins.",
            ),
            (
                "Where the time went",
                images.get("time", "") + time.section(run.goodput) + time.slow_steps(run.goodput),
                time.note(run.goodput),
            ),
            ("Reproduce", _reproduce(run), ""),
        ]
    )
    title, lead = _headline(run)
    return page(title=f"{run.name}: {title}", heading=title, lead=lead, tiles=tiles(run), body=body)


def _headline(run: Run) -> tuple[str, str]:
    before, after, stages = run.before, run.after, run.stages()
    if before and after:
        how = f"Context extended {_factor(after.trained / before.trained)} in {_stages(stages, above=before.trained)}."
        return f"{before.trained:,} → {after.trained:,} tokens", f"{how} Run {run.name}."
    longest = after.trained if after else max((stage.curve.length for stage in stages), default=0)
    if not stages:
        return f"{longest:,} tokens", f"Evaluations of {run.name}."
    said = f"{_stages(stages)}. Run {run.name}."
    for name, done, steps in run.progress():
        if done < steps:
            return f"{longest:,} tokens", f"{said} Not finished: {name} has {done:,} of {steps:,} steps."
    return f"{longest:,} tokens", said


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(caption, value, small print) of the key figures."""
    found: list[tuple[str, str, str]] = []
    before, after = run.before, run.after
    old, grid = _needles(before), _needles(after)
    if grid:
        above = before.trained if before else 0
        low, high = grid.interval(above)
        small = f"95% interval {100 * low:.0f}–{100 * high:.0f}%; worst cell {_percent(grid.worst(above))}"
        value = _percent(grid.mean(above)) if old is None else f"{_percent(old.mean(above))} → {_percent(grid.mean(above))}"
        found.append((f"needles beyond {above:,} tokens" if above else "needles found", value, small))
        threshold = _setting(after, "effective_threshold", 0.856)
        values = [g.effective_length(threshold) for g in (old, grid) if g is not None]
        certain = grid.effective_interval(threshold)
        range_of = f"; 95% interval {certain[0]:,}–{certain[1]:,}" if certain else ""
        small = f"longest with more than {_percent(threshold)} of needles{range_of}"
        found.append(("effective length", " → ".join(f"{v:,}" for v in values), small))
    old, curve = (_losses(result, scheme="none", metric="nll") for result in (before, after))
    if curve:
        first, longest = min(curve.values("length")), max(curve.values("length"))
        bits = _losses(after, scheme="none", metric="bits_per_byte").value(length=longest)
        values = [list(c.by_length().values())[-1] for c in (old, curve) if c is not None]
        small = f"{style.number(perplexity(curve.value(length=first)))} at {first:,}; {bits:.3f} bits per byte"
        found.append((f"perplexity at {longest:,}", " → ".join(style.number(perplexity(v)) for v in values), small))
    stages = run.stages()
    if stages:
        seconds, tokens = sum(s.seconds for s in stages), sum(s.tokens for s in stages)
        steps = sum(len(stage.curve.steps) for stage in stages)
        found.append(("training", duration(seconds), f"{style.number(tokens)} tokens, {steps:,} steps"))
    return found


def _needle_note(run: Run) -> str:
    grid = _needles(run.after)
    if grid is None:
        return ""
    items, old = grid.rows[0].n, _needles(run.before)
    made = [found for result in run.evals if (found := result.select(task="generated_needles"))]
    earlier = f" ({old.rows[0].n} before the extension)" if old and old.rows[0].n != items else ""
    extra = "".join(f" By generation at {g.trained:,}: {_percent(g.mean())} of {g.rows[0].n} a cell." for g in made)
    return html.escape(
        f"Share of needles found, of {items} in each cell{earlier}, with fresh keys and values in held-out text. "
        "Found means: every answer token is the most likely one given all before it. Lengths include the answer. "
        f"The 95% interval of a cell is ±{100 * _half(wilson(items // 2, items)):.0f} points at its widest.{extra}"
    )


def _perplexity_note(run: Run) -> str:
    curve, last = (_losses(run.after, scheme="none", metric=metric) for metric in ("nll", "final_nll"))
    if curve is None or last is None:
        return ""
    stride = _setting(run.after, "stride", None)
    moves = "the whole window" if stride is None else f"up to {stride:,} tokens"
    finals = ", ".join(f"{length:,}: {perplexity(nll):.4g}" for length, nll in last.by_length().items())
    return html.escape(
        f"The same {curve.rows[0].n:,} held-out tokens at each length; the window is the length, and it moves on by {moves}; "
        f"weighted by token. Extended model on the last {last.rows[0].n:,} of them, which see the full window: {finals}. "
        + " ".join(run.after.notes)
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
    return f"<div class=words>{table(heads, rows)}</div>" if rows else ""


_PART_NOTE = (
    "Mean loss per token, weighted as in training, over the last tenth of the steps that had tokens of the part; in grey, over the "
    "first tenth."
)


def _part_table(stages: Sequence[Stage]) -> str:
    """The loss of each part at the end of each stage that the run kept; nothing where there are not several parts."""
    kept = [stage for stage in stages if stage.curve.kept]
    names = list(dict.fromkeys(name for stage in kept for name in stage.parts))
    if len(names) < 2:
        return ""
    rows: list[tuple[Sequence[Cell], str]] = []
    for stage in kept:
        cells: list[Cell] = [stage.curve.name]
        for name in names:
            loss = [x for x in stage.parts[name].loss if math.isfinite(x)] if name in stage.parts else []
            count = max(1, len(loss) // 10)
            first, last = (sum(x) / count for x in (loss[:count], loss[-count:]))
            cells.append((f"{last:.3f}", f"{first:.3f}") if loss else "–")
        rows.append((cells, ""))
    return table(("stage", *names), rows)


def _decision(row: Any) -> str:
    verdict = str(row.get("verdict") or row.get("decision") or "")
    reason = str(row.get("reason") or "")
    return f"{verdict}: {reason}" if verdict and reason else verdict or reason


def _zero_shot(run: Run) -> str:
    base, curves = run.before or run.after, perplexity_curves(run)
    schemes = base.values("scheme") if base else []
    if len(schemes) < 2 or not curves:
        return ""
    lengths = sorted(next(iter(curves.values())).select(metric="nll").values("length"))
    grids = {name: _needles(run.after if name == "extended" else base, curve.rows[0].scheme) for name, curve in curves.items()}
    asked = {name: grid for name, grid in grids.items() if grid}
    items = dict(zip(asked, plots.counted(list(asked.values())), strict=True))
    differ = any(items.values())
    rows = []
    for name, curve in curves.items():
        extended = name == "extended"
        losses = curve.select(metric="nll").by_length()
        shares = asked[name].by_length() if name in asked else {}
        cells: list[Cell] = [name, *([items.get(name, "–")] if differ else [])]
        for length in lengths:
            value = style.number(perplexity(losses[length])) if length in losses else "–"
            cells.append((value, f"{100 * shares[length]:.0f}%") if length in shares else value)
        rows.append((cells, "strong" if extended else ""))
    found = f", of {next(iter(asked.values())).rows[0].n:,} in each cell" if asked else ""
    if differ:
        found = "; where the numbers of needles a cell differ, so do the needles, and shares differ by chance as well"
    heads = ("scheme", "needles a cell") if differ else ("scheme",)
    note = (
        f"Perplexity, with the share of needles found in grey{found}. "
        "The factor of each scheme is length / trained length, chosen at each length unless given."
    )
    return table((*heads, *(f"{length:,}" for length in lengths)), rows) + f"<p class=note>{html.escape(note)}</p>"


def _reproduce(run: Run) -> str:
    parts = []
    environment = dict(run.environment)
    if command := environment.pop("command", None):
        parts.append(f"<pre class=command>{html.escape(str(command))}</pre>")
    if environment:
        rows = [((key.replace("_", " "), str(value)), "") for key, value in environment.items()]
        parts.append(f"<div class=words>{table(('environment', ''), rows)}</div>")
    if run.config:
        text = html.escape(json.dumps(run.config, indent=2))
        parts.append(f"<details><summary>Config</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _setting(result: EvalResult, name: str, default: Any) -> Any:
    settings = result.settings.get("evals")
    return settings.get(name, default) if isinstance(settings, dict) else default


def _stages(stages: Sequence[Stage], above: int = 0) -> str:
    count = sum(stage.curve.kept and stage.curve.length > above for stage in stages)
    return f"{count} stage{'' if count == 1 else 's'}"


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


def _factor(value: float) -> str:
    return f"{value:.3g}×"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}".removesuffix(".0") + "%"
