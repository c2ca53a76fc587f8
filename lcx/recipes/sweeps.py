"""Sweeps: points made by combinators over config paths, each run in a process of its own.

    points = prod(param("stages[1].theta", 1e3, 4e3, 16e3), param("seed", 0, 1))
    run_sweep(points, base, workdir, cli_argv("configs/quickstart.py"))

A workdir holds `points/<name>/` (the point's own workdir, with `result.json` when it is finished, else `failed.json`, and its
`log.txt`), `results.json`, `results.csv` and `sweep.png` over all of them, and `compiled/`, programs that points share.
"""

from __future__ import annotations

import contextlib
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
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lcx.core import configs
from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.evals.results import perplexity
from lcx.model.execution import refuse_moved
from lcx.report import history, style, sweep_plots
from lcx.report.sweep_plots import PointResult

Overrides = dict[str, Any]
"""Config path -> value: what sets one point apart from the base config."""

ArgvFor = Callable[[Overrides, pathlib.Path], Sequence[str]]
"""`(overrides, the point's workdir) -> command line` that runs the point and exits with 0 when it is finished."""


_COMPILE_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


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


def _check_start(points: Sequence[Overrides], base: Mapping[str, Any]) -> None:
    """Raises `UserError` when the weights that points start from are not there: said once, not by every point."""
    for start in {point.get("init_from", base.get("init_from")) for point in points} - {None}:
        if not pathlib.Path(start).is_dir():
            raise UserError(
                f"init_from={start!r} is not a directory; train these weights first, as the header of the sweep's file says, or "
                "name others with --config.init_from=..."
            )


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
) -> list[PointResult]:
    """Run every point that is not finished, then write the results, print a table and draw a plot.

    Each point is a process of its own, so that one that is killed or out of memory leaves the others alone: it is recorded as
    failed with the reason and tried again when the sweep is next started. `collect` reads a finished point's workdir into
    numbers (default: `collect_run`), `timeout` is seconds for one point, `metric` what to plot (default: the first of
    needles, perplexity, loss that there is). Raises `UserError` for unknown paths before anything runs.
    """
    check_paths(points, base)
    _check_start(points, base)
    workdir, named = pathlib.Path(workdir), names(points)
    outcomes = []
    for i, (name, overrides) in enumerate(zip(named, points, strict=True), 1):
        folder = workdir / "points" / name
        outcome = _finished(folder, name, overrides)
        if outcome is None:
            say(f"sweep {i}/{len(points)}: {name}")
            outcome = _run_point(name, overrides, folder, argv_for, collect or collect_run, timeout)
        say(f"sweep {i}/{len(points)}: {name} {_line(outcome)}")
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


def _run_point(
    name: str, overrides: Overrides, folder: pathlib.Path, argv_for: ArgvFor, collect: Callable, timeout: float | None
) -> PointResult:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    reason, numbers = _execute(list(argv_for(overrides, folder)), folder / "log.txt", timeout), {}
    if not reason:
        try:
            numbers = collect(folder)
        except (UserError, OSError, ValueError, KeyError) as error:
            reason = f"it ended well but its results cannot be read: {error}"
    seconds = time.perf_counter() - started
    outcome = PointResult(name, dict(overrides), "failed" if reason else "finished", reason, seconds, numbers)
    write_atomically(folder / ("failed.json" if reason else "result.json"), json.dumps(configs.plain(outcome), indent=1) + "\n")
    if not reason:
        (folder / "failed.json").unlink(missing_ok=True)
    return outcome


def _execute(argv: list[str], log: pathlib.Path, timeout: float | None) -> str:
    """Run a command with its output in `log`; empty when it exits with 0, else the reason why it did not.

    Points keep what they compile in the sweep's folder: those that differ in a theta alone share one program.
    """
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(log.absolute().parents[2] / "compiled"), _COMPILE_SECONDS: "0.3"}
    environment = {**compiled, **os.environ}
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
        except OSError as error:
            return f"it could not be started: {error}"
        try:
            with _passing_on(process):
                code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"it took longer than {timeout:g} s"
        except (KeyboardInterrupt, SystemExit):
            # The terminal has sent the interrupt to the point too, which saves a checkpoint; leave it the time to.
            process.wait()
            raise
    if code < 0:
        number = -code
        text = signal.Signals(number).name if number in iter(signal.Signals) else f"signal {number}"
        return f"killed by {text}" + (" (out of memory, perhaps)" if number == signal.SIGKILL else "")
    return f"exit status {code}: {_last_line(log)}" if code else ""


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[None]:
    """While the point runs, a SIGTERM to the sweep ends the point too, so that it does not write during the next one."""

    def end(number: int, _: object) -> None:
        process.terminate()
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finished(folder: pathlib.Path, name: str, overrides: Overrides) -> PointResult | None:
    """The recorded result of a point that is finished, if there is one."""
    try:
        values = json.loads((folder / "result.json").read_text())
        result = configs.build(PointResult, values, str(folder / "result.json"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if configs.plain(result.overrides) != configs.plain(overrides):
        raise UserError(
            f"{folder} holds a point with overrides that differ from those of {name!r}; use another workdir for the changed sweep"
        )
    return result


def _last_line(log: pathlib.Path) -> str:
    lines = [line.strip() for line in log.read_bytes()[-4096:].decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


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
