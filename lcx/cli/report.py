"""Rewrite a run's report.html and plots from the files in its workdir.

lcx report --workdir=runs/quickstart
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.report.report import write_report


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "the run's workdir", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Write the report."""
    workdir = values.workdir or (rest[0] if len(rest) == 1 else None)
    if workdir is None:
        raise UserError("--workdir is missing; name the workdir of a run")
    say(f"report: {write_report(workdir)}")
