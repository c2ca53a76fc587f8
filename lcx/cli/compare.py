"""Compare two evaluations on the same items, paired: what has a checkpoint gained or lost?

lcx compare runs/quickstart
lcx compare runs/quickstart/eval/before.json runs/longer/eval/after.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.evals import comparison, results


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("scheme", "none", "compare what was measured under this positional scheme", flag_values=values)
    flags.DEFINE_integer("up_to", None, "leave longer lengths out", lower_bound=2, flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Print every task's two means and their paired difference."""
    if len(rest) == 1:
        folder = Path(rest[0]) / "eval"
        if not folder.parent.is_dir():
            what = "is a single file" if folder.parent.exists() else "does not exist"
            raise UserError(f"{rest[0]} {what}; name a run's workdir, or two evaluations, as in lcx compare ONE.json OTHER.json")
        if not all((folder / f"{label}.json").exists() for label in ("before", "after")):
            raise UserError(
                f"{rest[0]} has not been evaluated before and after; `lcx run` does that at its end, so repeat the command to "
                "finish it, or name two evaluations"
            )
        rest = [str(folder / f"{label}.json") for label in ("before", "after")]
    if len(rest) != 2:
        raise UserError(
            f"lcx compare takes a run's workdir or two evaluations but got {len(rest)}; use lcx compare ONE.json OTHER.json"
        )
    before, after = map(results.read, rest)
    for path, result in zip(rest, (before, after), strict=True):
        if values.scheme not in (schemes := result.values("scheme")):
            raise UserError(f"--scheme={values.scheme} is not in {path}, which has {', '.join(map(repr, schemes)) or 'no rows'}")
    found = comparison.compare(before, after, values.scheme, values.up_to)
    if not found and values.up_to is not None and (longer := comparison.compare(before, after, values.scheme)):
        shortest = min(row.length for row in longer)
        raise UserError(f"--up_to={values.up_to} is below {shortest:,}, the shortest length that both measured; raise it")
    if not found:
        raise UserError(
            f"{rest[0]} and {rest[1]} have no items in common under scheme {values.scheme!r}{_why(before, after, values.scheme)}; "
            "evaluate both with the same tokenizer, tasks, lengths, items and seed"
        )
    heads = ("task", "metric", "length", "items", before.label, after.label, "difference [95%]", "higher / lower", "verdict")
    table("the same items", heads, map(_cells, found))
    say(tally([row.verdict for row in found]))


def tally(verdicts: Sequence[str]) -> str:
    """How many comparisons came out better and worse, and equal or unknown if any did, as a sentence."""
    better, worse, equal, unknown = (verdicts.count(verdict) for verdict in ("better", "worse", "equal", "unknown"))
    said = f"{len(verdicts)} compared: {better} better, {worse} worse"
    said += f", {equal} equal within 95%" if equal else ""
    return said + (f", {unknown} of a single item, which shows nothing" if unknown else "")


def _why(before: results.EvalResult, after: results.EvalResult, scheme: str) -> str:
    """The first task and length that both have with other items, or nothing if there is none."""
    rows = ([row for row in result.rows if row.scores and row.scheme == scheme] for result in (before, after))
    counts = [{(row.task, row.length): row.n for row in found} for found in rows]
    task, length = next((key for key in counts[0] if key in counts[1]), (None, 0))
    if task is None:
        return ""
    one, other = (found[task, length] for found in counts)
    return f": {task} at {length:,} has {one} and {other} items" if one != other else f": {task} at {length:,} has other items"


def _cells(row: comparison.Comparison) -> tuple[object, ...]:
    *_, above, below = row.difference
    means = row.shown(row.before), row.shown(row.after)
    return row.task, row.metric, f"{row.length:,}", row.n, *means, row.gap, f"{above} / {below}", row.verdict
