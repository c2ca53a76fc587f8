"""What a run left in its workdir, read back: the one place that knows the files' names and fields.

config.json        the whole config          metrics.jsonl      a row for each step
environment.json   versions, devices, command    decisions.jsonl    a row for each decision of the monitor
eval/*.json        evaluations; `before` and `after` the extension make the comparison
goodput.jsonl      where the time went
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.evals import results
from lcx.evals.results import EvalResult
from lcx.report.plots import PartCurve, StageCurve
from lcx.training import goodput
from lcx.training.goodput import Goodput


@dataclasses.dataclass(frozen=True)
class Stage:
    """One try of one stage: its curve, the tokens and seconds that it took, what the monitor said of it, and its parts' curves."""

    curve: StageCurve
    attempt: int
    tokens: int
    seconds: float
    decisions: tuple[Mapping[str, Any], ...] = ()
    parts: Mapping[str, PartCurve] = dataclasses.field(default_factory=dict)

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps, since one step's loss says little."""
        tail = [x for x in self.curve.loss if math.isfinite(x)][-max(1, len(self.curve.loss) // 10) :]
        return sum(tail) / len(tail) if tail else math.nan


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files as plain values; what is missing is empty."""

    name: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    decisions: tuple[Mapping[str, Any], ...]
    evals: tuple[EvalResult, ...]
    answers: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    goodput: Goodput | None = None

    @property
    def before(self) -> EvalResult | None:
        """The evaluation of the model that the extension started from."""
        return next((result for result in self.evals if result.label == "before"), None)

    @property
    def after(self) -> EvalResult | None:
        """The evaluation of the extended model; the latest one when none is called so."""
        named = [result for result in self.evals if result.label == "after"]
        others = [result for result in self.evals if result.label != "before" and "/" not in result.label]
        return (named or sorted(others, key=lambda result: (result.step or 0, result.trained)) or [None])[-1]

    def stages(self) -> list[Stage]:
        """Every try of every stage in the order of training; a step that was logged twice (after a resume) counts once."""
        groups: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
        for row in self.metrics:
            if "loss" in row and "step" in row:
                key = (str(row.get("stage", "")), int(row.get("attempt", 0)))
                groups.setdefault(key, {})[int(row["step"])] = row
        last_try = {stage: max(attempt for name, attempt in groups if name == stage) for stage, _ in groups}
        return [self._stage(stage, attempt, rows, last_try[stage] == attempt) for (stage, attempt), rows in groups.items()]

    def progress(self) -> list[tuple[str, int, int]]:
        """Each stage of the config with the last step of its last try, and the number of its steps."""
        done = {str(row.get("stage")): int(row.get("stage_step", 0)) for row in self.metrics}
        return [(stage["name"], done.get(stage["name"], 0), stage.get("steps", 0)) for stage in self.config.get("stages", ())]

    def _stage(self, name: str, attempt: int, by_step: Mapping[int, Mapping[str, Any]], kept: bool) -> Stage:
        steps = sorted(by_step)
        rows = [by_step[step] for step in steps]
        length = next((int(row["seq_len"]) for row in rows if "seq_len" in row), 0)
        theta = next((float(row["theta"]) for row in rows if row.get("theta") is not None), None)
        config = next((stage for stage in self.config.get("stages", ()) if stage.get("name") == name), {})
        tokens = int(config.get("batch_size", 0)) * length
        speeds = [_number(row.get("tokens_per_second")) for row in rows]
        seconds = sum(tokens / speed for speed in speeds if speed > 0)
        curve = StageCurve(name, length, theta, tuple(steps), tuple(_number(row["loss"], math.nan) for row in rows), kept)
        said = tuple(d for d in self.decisions if str(d.get("stage")) == name and int(d.get("attempt", 0)) == attempt)
        return Stage(curve, attempt, tokens * len(rows), seconds, said, _parts(steps, rows))


def load(workdir: str | os.PathLike[str], add: Sequence[str | os.PathLike[str]] = ()) -> Run:
    """Read a workdir, and evaluations of other runs, files `RUN/eval/LABEL.json`, which are labelled `RUN/LABEL`.

    Raises `UserError` when the workdir is not there or holds neither metrics nor an evaluation, or another file cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        what = "is a file" if workdir.exists() else "does not exist"
        raise UserError(f"workdir {workdir} {what}; give the --workdir of a run")
    evals = [results.read(path) for path in sorted((workdir / "eval").glob("*.json"))]
    for path in map(pathlib.Path, add):
        found = results.read(path)
        evals.append(dataclasses.replace(found, label=f"{path.resolve().parent.parent.name}/{found.label}"))
    run = Run(
        name=workdir.resolve().name,
        config=_json(workdir / "config.json"),
        metrics=tuple(_rows(workdir / "metrics.jsonl")),
        decisions=tuple(_rows(workdir / "decisions.jsonl")),
        evals=tuple(evals),
        answers=tuple(_rows(workdir / "eval" / "answers.jsonl")),
        environment=_json(workdir / "environment.json"),
        goodput=goodput.summary(_rows(workdir / goodput.FILE)),
    )
    if not run.metrics and not run.evals:
        raise UserError(f"workdir {workdir} has neither metrics.jsonl nor eval/*.json; train or evaluate there first")
    return run


def _parts(steps: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> dict[str, PartCurve]:
    """The loss of each part of the mixture, by name, over the steps in which it had tokens to learn from."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, row in zip(steps, rows, strict=True):
        for name, loss in row.get("loss_by_part", {}).items():
            found.setdefault(name, []).append((step, _number(loss, math.nan)))
    return {name: PartCurve(*zip(*found[name], strict=True)) for name in sorted(found)}


def _number(value: Any, missing: float = 0.0) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else missing


def _json(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it from a copy") from None


def _rows(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """Rows of a JSONL file; a last line cut short by a kill is left out, any other bad line is said."""
    if not path.exists():
        return []
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                warn(f"{path}:{i + 1} is not JSON; skipping the line")
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
