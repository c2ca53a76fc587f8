"""Choose theta for a target length: the rules side by side, the pairs that never completed a turn in training, a staged schedule.

lcx theta --from 8K --theta 500000 --to 1M --head-dim 128 [--json]
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from lcx.cli import parse
from lcx.core.configs import plain
from lcx.core.console import say, table
from lcx.core.errors import UserError, naming
from lcx.positions.theta import ThetaReport, report


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    parse.define_length("from", 8192, "length in tokens that the model was trained at, such as 8192 or 8K", values)
    flags.DEFINE_float("theta", 5e5, "rotary base that the model was trained with", flag_values=values)
    parse.define_length("to", 1048576, "target length in tokens, such as 1048576 or 1M", values)
    flags.DEFINE_integer("head_dim", 128, "rotary dimensions of a head", short_name="head-dim", flag_values=values)
    flags.DEFINE_float("factor", 4.0, "growth factor from stage to stage", flag_values=values)
    flags.DEFINE_bool("lower_bound", True, "also search for the lower bound (takes seconds)", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON instead of tables", flag_values=values)


@naming({"trained length": "--from", "target length": "--to"})
def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Print the report."""
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; see lcx theta --help")
    found = report(values["from"].value, values.theta, values.to, values.head_dim, values.factor, values.lower_bound)
    if values.json:
        print(json.dumps(plain(found), indent=2))
        return
    for line in sentences(found):
        say(line)
    table("staged schedule: train each stage at its critical base", found.HEADER, found.rows())
    say("sweep, lowest (NTK-aware, the low control) to highest: " + ", ".join(f"{theta:.4g}" for theta in found.ladder))


def sentences(found: ThetaReport) -> list[str]:
    """The report's figures for the trained model and the target, one per line."""
    pairs = found.untrained_pairs
    never = f"{len(pairs)} of {found.head_dim // 2} ({pairs[0]} to {pairs[-1]})" if pairs else "none"
    lines = [
        f"trained at {found.trained_length:,} with theta {found.theta:.6g}, head dim {found.head_dim}",
        f"critical dimension: {found.critical_dimension}; rotary pairs that never completed a turn: {never}",
        f"to {found.target_length:,}: critical base {found.critical_base:.4g}, NTK-aware base {found.ntk_base:.4g}",
    ]
    if found.lower_bound is not None:
        lines[-1] += f", lower bound {found.lower_bound:.2g}"
    return lines
