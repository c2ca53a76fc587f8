"""Lay an adapter or extracted differences over a model of the same architecture, into a new Hugging Face folder.

lcx apply DELTA MODEL --out=DIR
lcx apply models/context models/MyLlama-3-8B --out=models/MyLlama-3-8B-1M [--weight=0.8] [--rotary=delta]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.errors import UserError
from lcx.core.numbers import counted
from lcx.merging.apply import Application


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "directory to create", flag_values=values)
    flags.DEFINE_float("weight", 1.0, "multiplies the change", flag_values=values)
    about = "whose rotary settings and length the result has, delta or target (default: the delta's, if the target has its base's)"
    flags.DEFINE_string("rotary", None, about, flag_values=values)
    flags.DEFINE_string("dtype", None, "type of the result's numbers (default: the target's)", flag_values=values)
    flags.DEFINE_float(
        "max_shard_gb", 5.0, "maximum size of a file of the directory in gigabytes", lower_bound=1e-6, flag_values=values
    )


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Apply."""
    if len(rest) != 2:
        got = counted(len(rest), "name")
        raise UserError(f"lcx apply takes a delta and a model but got {got}; use lcx apply DELTA TARGET --out=DIR")
    out = Path(parse.needed(values, "out", "name a new directory"))
    application = Application(*rest, weight=values.weight, rotary=values.rotary, dtype=values.dtype)
    application.write(out, int(values.max_shard_gb * 1e9))
