"""Sweeps: points made by combinators over config paths, each run in a process of its own.

    points = prod(param("stages[1].theta", 1e3, 4e3, 16e3), param("seed", 0, 1))
    run_sweep(points, base, workdir, cli_argv("configs/quickstart.py"))

A workdir holds `points/<name>/` (the point's own workdir, with `result.json` when it is finished, else `failed.json`, and its
`log.txt`), `results.json`, `results.csv` and `sweep.png` over all of them, and `compiled/`, programs that points share.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import keyword
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections

from lcx.core import configs
from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.gguf import is_gguf
from lcx.evals.results import perplexity
from lcx.model.execution import refuse_moved
from lcx.recipes.point import Task, finished, look_at, run_point
from lcx.report import history, style, sweep_plots
from lcx.report.sweep_plots import PointResult

Overrides = dict[str, Any]
"""Config path -> value: what sets one point apart from the base config."""

ArgvFor = Callable[[Overrides, pathlib.Path], Sequence[str]]
"""`(overrides, the point's workdir) -> command line` that runs the point and exits with 0 when it is finished."""


def param(path: str, *values: Any) -> list[Overrides]:
    """One point for each value of a config path such as `optim.lr` or `stages[1].theta`."""
    if not values:
        raise UserError(f"the sweep over {path!r} has no values; give at least one")
    return [{path: value} for value in values]


def prod(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Every combination, the last sweep varying fastest."""
    return [_join(parts) for parts in itertools.product(*sweeps)]


def zip_(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """First with first, second with second; raises `UserError` when the lengths differ."""
    if len({len(sweep) for sweep in sweeps}) > 1:
        raise UserError(f"zip_ needs sweeps of equal length; got lengths {', '.join(str(len(sweep)) for sweep in sweeps)}")
    return [_join(parts) for parts in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """One after the other; a point that comes twice is kept once."""
    points: list[Overrides] = []
    for point in itertools.chain(*sweeps):
        if point not in points:
            points.append(dict(point))
    return points


def names(points: Sequence[Overrides]) -> list[str]:
    """A readable name for each point, the same whenever the overrides are: `theta=4000,seed=1`, safe as a file's name.

    Paths are cut to the shortest ending that tells them apart. Long names end in a fingerprint of the point. Lists stand in the
    names only if the points cannot be told apart without them.
    """
    plain = [{path: value for path, value in point.items() if not isinstance(value, list | tuple)} for point in points]
    if all(plain) and all(plain.count(point) == 1 for point in plain):
        points = plain
    paths = list(dict.fromkeys(path for point in points for path in point))
    short = {path: _ending(path, paths) for path in paths}
    out = []
    for point in points:
        text = ",".join(f"{short[path]}={_text(value)}" for path, value in point.items()) or "base"
        name = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", text).strip("-.")
        out.append(name if len(name) <= 100 and name == text else f"{name[:80]}-{configs.fingerprint(point)[:8]}")
    if len(set(out)) < len(out):
        twice = next(name for name in out if out.count(name) > 1)
        raise UserError(f"point {twice!r} occurs twice in the sweep; join sweeps with chain, which keeps one")
    return out


def check_paths(points: Sequence[Overrides], base: Mapping[str, Any]) -> None:
    """Raises `UserError` with the nearest path when a point overrides something that the base config does not have."""
    known = {_dotted(path): path for path in _paths(base)}
    for path in dict.fromkeys(path for point in points for path in point):
        refuse_moved(path)
        if _dotted(path) not in known:
            close = difflib.get_close_matches(_dotted(path), known, n=1, cutoff=0.4)
            hint = f"; did you mean {known[close[0]]!r}?" if close else f"; its top fields are {', '.join(sorted(map(str, base)))}"
            raise UserError(f"the sweep sets {path!r}, which the config does not have{hint}")


def config_of(point: Overrides, base: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a point: a copy of the base config with the point's values, whose paths are known (`check_paths`)."""
    config = base.copy_and_resolve_references()
    with config.ignore_type():
        for path, value in point.items():
            *way, last = _dotted(path).split(".")
            place: Any = config
            for part in way:
                place = place[int(part) if isinstance(place, list) else part]
            place[int(last) if isinstance(place, list) else last] = value
    return config


def check_start(points: Sequence[Overrides], base: Mapping[str, Any]) -> None:
    """Raises `UserError` when the weights that points start from are not there: said once, not by every point."""
    for start in {point.get("init_from", base.get("init_from")) for point in points} - {None}:
        path = pathlib.Path(start)
        if not (path.is_dir() or is_gguf(path) and path.is_file()):
            raise UserError(
                f"init_from={start!r} is neither a directory nor a GGUF file; train these weights first, as the header of the "
                "sweep's file says, or name others with --config.init_from=..."
            )


def points_of(loaded: ModuleType, filename: str) -> list[Overrides]:
    """The points of a sweep's config file; raises `UserError` for a file that makes none."""
    if not hasattr(loaded, "get_sweep"):
        raise UserError(f"{filename} has no get_sweep(); define it, or use a file in configs/sweeps")
    points = loaded.get_sweep()
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise UserError(f"get_sweep() of {filename} returned {points!r:.60}; make a list of points with lcx.recipes.sweeps")
    return points


def cli_argv(config_file: str, command: str = "train", extra: Sequence[str] = ()) -> ArgvFor:
    """Command lines `python -m lcx.cli <command> --config=... --config.<path>=<value> --workdir=...` for the points.

    `extra` stands before the point's own values, which therefore win.
    """

    def argv(overrides: Overrides, workdir: pathlib.Path) -> list[str]:
        flags = [f"--config.{_flag(path)}={_text(value)}" for path, value in overrides.items()]
        return [sys.executable, "-m", "lcx.cli", command, f"--config={config_file}", *extra, *flags, f"--workdir={workdir}"]

    return argv


def run_sweep(
    points: Sequence[Overrides],
    base: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    argv_for: ArgvFor,
    *,
    collect: Callable[[pathlib.Path], dict[str, Any]] | None = None,
    timeout: float | None = None,
    metric: str | None = None,
    runner: Callable[[Callable, Iterable], Iterator[PointResult]] = map,
    only_collect: bool = False,
) -> list[PointResult]:
    """Run every point that is not finished, then write the results, print a table and draw a plot.

    Each point is a process of its own, so that one that is killed or out of memory leaves the others alone: it is recorded as
    failed with the reason and tried again when the sweep is next started. `collect` reads a finished point's workdir into
    numbers (default: `collect_run`), `timeout` is seconds for one point, `metric` what to plot (default: the first of
    needles, perplexity, loss that there is). `runner` gives the results of a function of each of some tasks, in order, as `map`
    does here and an engine on a cluster whose machines all see the workdir (`data.curation.cluster.engine`). With `only_collect`
    nothing runs: points with a report, as jobs of their own leave them, are finished. Raises `UserError` for unknown paths before
    anything runs.
    """
    check_paths(points, base)
    check_start(points, base)
    workdir, named = pathlib.Path(workdir).absolute(), names(points)
    tasks = [
        Task(
            name,
            overrides,
            workdir / "points" / name,
            list(argv_for(overrides, workdir / "points" / name)),
            collect or collect_run,
            timeout,
        )
        for name, overrides in zip(named, points, strict=True)
    ]
    known = {task.name: finished(task.folder, task.name, task.overrides) for task in tasks}
    running = iter(runner(look_at if only_collect else run_point, (task for task in tasks if known[task.name] is None)))
    outcomes = []
    for i, task in enumerate(tasks, 1):
        outcome = known[task.name]
        if outcome is None:
            say(f"sweep {i}/{len(points)}: {task.name}")
            outcome = next(running)
        say(f"sweep {i}/{len(points)}: {task.name} {_line(outcome)}")
        outcomes.append(outcome)
        write_results(outcomes, workdir)
    show(outcomes)
    figure = sweep_plots.figure(outcomes, metric)
    if figure is not None:
        style.save(figure, workdir / "sweep.png")
    say(f"results: {workdir / 'results.json'}" + ("" if figure is None else f", plot: {workdir / 'sweep.png'}"))
    return outcomes


def collect_run(workdir: pathlib.Path) -> dict[str, Any]:
    """The numbers of a finished run: loss and seconds of training, needles and perplexity overall and by length."""
    run = history.load(workdir)
    numbers: dict[str, Any] = {}
    stages = [stage for stage in run.stages() if stage.curve.kept]
    if stages:
        numbers |= {"loss": stages[-1].final_loss, "train_seconds": sum(stage.seconds for stage in run.stages())}
    own = run.after.select(scheme="none") if run.after else None
    if own and (grid := own.select(task="needles")):
        numbers |= {"needles": grid.mean(), "worst_cell": grid.worst(), "effective_length": grid.effective_length()}
        numbers["needles_by_length"] = {str(length): share for length, share in grid.by_length().items()}
    if own and (curve := own.select(task="perplexity", metric="nll")):
        by_length = {str(length): perplexity(nll) for length, nll in curve.by_length().items()}
        numbers |= {"perplexity": list(by_length.values())[-1], "perplexity_by_length": by_length}
    return numbers


def write_results(outcomes: Sequence[PointResult], workdir: pathlib.Path) -> None:
    """`results.json` with everything and `results.csv` with a row for each point."""
    write_atomically(workdir / "results.json", json.dumps([configs.plain(outcome) for outcome in outcomes], indent=1) + "\n")
    paths = list(dict.fromkeys(path for outcome in outcomes for path in outcome.overrides))
    numbers = list(dict.fromkeys(key for outcome in outcomes for key in outcome.scalars()))
    written = io.StringIO()
    rows = csv.writer(written)
    rows.writerow(["name", "status", *paths, *numbers, "seconds", "reason"])
    for outcome in outcomes:
        values = [_text(outcome.overrides[path]) if path in outcome.overrides else "" for path in paths]
        scalars = outcome.scalars()
        found = [scalars.get(key, "") for key in numbers]
        rows.writerow([outcome.name, outcome.status, *values, *found, round(outcome.seconds, 1), outcome.reason])
    write_atomically(workdir / "results.csv", written.getvalue())


def show(outcomes: Sequence[PointResult]) -> None:
    """Print the table of points; what failed says why."""
    numbers = list(dict.fromkeys(key for outcome in outcomes for key in outcome.scalars()))
    rows = []
    for outcome in outcomes:
        scalars = outcome.scalars()
        cells = [style.number(scalars[key]) if key in scalars else "" for key in numbers]
        rows.append([outcome.name, *cells, f"{outcome.seconds:,.0f}", outcome.reason or outcome.status])
    table("Sweep", ["point", *(key.replace("_", " ") for key in numbers), "seconds", "status"], rows)


def _line(outcome: PointResult) -> str:
    if outcome.status == "failed":
        return f"failed: {outcome.reason}"
    return "  ".join(f"{key.replace('_', ' ')} {style.number(value)}" for key, value in outcome.scalars().items()) or "finished"


def _join(parts: Sequence[Overrides]) -> Overrides:
    joined: Overrides = {}
    for part in parts:
        for path, value in part.items():
            if path in joined:
                raise UserError(f"the sweep sets {path!r} twice in one point, to {joined[path]!r} and {value!r}")
            joined[path] = value
    return joined


def _ending(path: str, paths: Sequence[str]) -> str:
    paths = [_dotted(other).removesuffix(".default") for other in paths]
    parts = _dotted(path).removesuffix(".default").split(".")
    for count in range(1, len(parts) + 1):
        ending = ".".join(parts[-count:])
        if not ending[0].isdigit() and sum(f".{other}".endswith(f".{ending}") for other in paths) == 1:
            return ending
    return ".".join(parts)


def _dotted(path: str) -> str:
    """`stages[1].theta` as `stages.1.theta`, the form in which paths are compared."""
    return re.sub(r"\[(\d+)\]", r".\1", path)


def _flag(path: str) -> str:
    """A path as flags read it, as Python: `positions["global"]`, since `positions.global` is not an expression."""
    first, *rest = path.split(".")
    return first + "".join(f'["{part}"]' if keyword.iskeyword(part) else f".{part}" for part in rest)


def _paths(value: Any, path: str = "") -> Iterator[str]:
    """Every path into nested mappings and sequences, inner ones included, in the notation of flags."""
    items: Iterator[tuple[str, Any]] = iter(())
    if hasattr(value, "items"):
        items = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        items = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    for inner, item in items:
        yield inner
        yield from _paths(item, inner)


def _text(value: Any) -> str:
    """A value as a flag takes it: whole floats without an exponent or a trailing .0, the rest as Python writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
