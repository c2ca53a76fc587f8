"""What an evaluation found: rows that go to JSON and back, and the views of them that pictures and tables need."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.core import configs
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.evals.statistics import drawn_means, wilson


def perplexity(nll: float) -> float:
    """exp of a mean loss in nats per token; infinite beyond what a float holds."""
    return math.exp(nll) if nll < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number: the mean `value` of a task's `metric` over `n` items, or tokens for losses.

    `length` in tokens, answer included. `scheme` says how positions were encoded; "none" is the checkpoint as it was trained.
    `depth` is where the answer stands, from 0 (start of the context) to 1 (just before the question); `positions` the range
    `first <= p < end` of positions in the window that a loss is the mean over; None: does not apply. `low` and `high` are the 95%
    interval. `scores` are the values of single items, in their order, and `digest` tells these items from others: rows of the same
    digest and `n` can be paired.
    """

    task: str
    metric: str
    length: int
    value: float
    n: int
    depth: float | None = None
    positions: tuple[int, int] | None = None
    low: float | None = None
    high: float | None = None
    scheme: str = "none"
    scores: tuple[float, ...] | None = None
    digest: str | None = None


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """All that was measured on one checkpoint, or a selection of it.

    `label` names it, `trained` is the longest length that it was trained at, `step` where it stands in the run. `settings` are
    the evaluation's, and `notes` sentences that a reader of the numbers should know.
    """

    label: str
    trained: int
    step: int | None = None
    rows: tuple[Measurement, ...] = ()
    seconds: float = 0.0
    settings: dict[str, object] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def select(self, **fields: object) -> EvalResult | None:
        """The rows whose fields have these values, as in `select(task="needles", scheme="none")`; None if there are none."""
        rows = tuple(row for row in self.rows if all(getattr(row, name) == value for name, value in fields.items()))
        return dataclasses.replace(self, rows=rows) if rows else None

    def values(self, field: str) -> list[Any]:
        """The different values of a field among the rows, in the order of their first appearance."""
        return list(dict.fromkeys(getattr(row, field) for row in self.rows))

    def value(self, **fields: object) -> float:
        """The mean of the rows whose fields have these values; raises `UserError` if there are none."""
        found = self.select(**fields)
        if found is None:
            asked = ", ".join(f"{name}={value!r}" for name, value in fields.items())
            lengths = ", ".join(map(str, self.values("length"))) or "none"
            raise UserError(f"{self.label} has no measurement with {asked}; measured lengths: {lengths}")
        return found.mean()

    def table(self) -> list[list[float]]:
        """Values by depth and length, `[depth][length]`."""
        return [[self.value(depth=depth, length=length) for length in self.values("length")] for depth in self.values("depth")]

    def by_length(self) -> dict[int, float]:
        """Mean over all else for each length, shortest first."""
        return {length: self.value(length=length) for length in sorted(self.values("length"))}

    def mean(self, above: int = 0) -> float:
        """Mean, weighted by items, of the rows whose length is above `above`; NaN when there are none."""
        total, items = self._total(above)
        return total / items if items else math.nan

    def worst(self, above: int = 0) -> float:
        """The lowest value at a length above `above`; NaN when there are none."""
        return min((row.value for row in self.rows if row.length > above), default=math.nan)

    def interval(self, above: int = 0) -> tuple[float, float]:
        """95% Wilson interval of a share over all rows whose length is above `above`."""
        total, items = self._total(above)
        return wilson(round(total), items)

    def effective_length(self, threshold: float = 0.856) -> int:
        """Longest length such that it and every shorter one average above `threshold` (RULER's 85.6%); 0 when none does."""
        reached = 0
        for length, share in self.by_length().items():
            if not share > threshold:
                break
            reached = length
        return reached

    def effective_interval(self, threshold: float = 0.856, draws: int = 4000) -> tuple[int, int] | None:
        """95% interval of `effective_length`, from means drawn anew for every row; None where a row keeps no single scores."""
        if any(row.scores is None for row in self.rows):
            return None
        rng, lengths = np.random.default_rng(0), sorted(self.values("length"))
        reached, before = np.zeros(draws, int), np.ones(draws, bool)
        for length in lengths:
            rows = [row for row in self.rows if row.length == length]
            total = sum(row.n * drawn_means(row.scores or (), draws, rng) for row in rows)
            before &= total / sum(row.n for row in rows) > threshold
            reached[before] = length
        low, high = np.quantile(reached, [0.025, 0.975], method="inverted_cdf")
        return int(low), int(high)

    def _total(self, above: int) -> tuple[float, int]:
        rows = [row for row in self.rows if row.length > above]
        return math.fsum(row.value * row.n for row in rows), sum(row.n for row in rows)


def write(result: EvalResult, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write the result as JSON, a row a line, what does not apply to it left out; the file appears whole or not at all."""
    values = configs.plain(dataclasses.replace(result, rows=()))
    del values["rows"]
    rows = map(json.dumps, plain_rows(result))
    head = json.dumps(values, indent=1).removesuffix("\n}")
    return write_atomically(path, f'{head},\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")


def plain_rows(result: EvalResult) -> list[dict[str, Any]]:
    """The rows of a result as plain values, what does not apply to one left out."""
    return [{key: value for key, value in configs.plain(row).items() if value is not None} for row in result.rows]


def read(path: str | os.PathLike[str]) -> EvalResult:
    """A result written by `write`; raises `UserError` when the file is missing or holds something else."""
    return from_mapping(_load(path), str(path))


def from_mapping(values: Mapping[str, Any], where: str = "result") -> EvalResult:
    """A result from the plain values of its JSON, also of the form that it had before it was made of rows."""
    if not {"label", "trained"} & values.keys():
        raise UserError(f"{where} is not an evaluation of lcx; name one such as runs/quickstart/eval/after.json")
    values = dict(values)
    rows = [*map(_needles, values.pop("needles", ())), *map(_perplexity, values.pop("perplexity", ()))]
    return configs.build(EvalResult, {"rows": [row for some in rows for row in some], **values}, where)


def _needles(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a grid `correct[depth][length]` of the former layout."""
    task, n = "generated_needles" if grid["method"] == "generation" else "needles", grid["items"]
    return [
        {
            "task": task, "metric": "accuracy", "length": length, "value": count / n, "n": n, "depth": depth,
            "low": wilson(count, n)[0], "high": wilson(count, n)[1], "scheme": grid["scheme"],
        }
        for i, length in enumerate(grid["lengths"])
        for depth, count in zip(grid["depths"], (row[i] for row in grid["correct"]), strict=True)
    ]  # fmt: skip


def _perplexity(curve: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a curve of the former layout."""
    named = {"task": "perplexity", "scheme": curve["scheme"]}
    rows, by_position = [], curve["positions"]
    for point in curve["points"]:
        bits = point["nll"] / math.log(2) / curve["bytes_per_token"]
        for metric, value, n in (("nll", point["nll"], point["tokens"]), ("bits_per_byte", bits, point["tokens"])):
            rows.append({**named, "metric": metric, "length": point["length"], "value": value, "n": n})
        final = {"metric": "final_nll", "value": point["final_nll"], "n": point["final_tokens"]}
        rows.append({**named, **final, "length": point["length"]})
    edges = zip(by_position["edges"][:-1], by_position["edges"][1:], by_position["nll"], by_position["tokens"], strict=True)
    for first, end, value, n in edges:
        where = {"positions": (first, end), "length": by_position["length"]}
        rows.append({**named, **where, "metric": "nll_by_position", "value": value, "n": n})
    return rows


def _others(folder: pathlib.Path) -> str:
    """The way out for an evaluation that is missing from a folder: those that are there, or what would write some."""
    if found := sorted(path.name for path in folder.glob("*.json")):
        return f"{folder} has {', '.join(found[:5])}" + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return (
        "`lcx run` writes eval/before.json and eval/after.json in its workdir, and `lcx eval` writes eval/LABEL.json, or without "
        "--label a name made of the stage or step and the schemes"
    )


def _load(path: str | os.PathLike[str]) -> Mapping[str, object]:
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {_others(pathlib.Path(path).parent)}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path} is not a file; name an evaluation, such as runs/quickstart/eval/after.json") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); name an evaluation, or evaluate again under another --label") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path} does not hold an evaluation; name one, such as runs/quickstart/eval/after.json")
    return values
