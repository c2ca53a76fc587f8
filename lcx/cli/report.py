"""Rewrite a run's report.html and plots from the files in its workdir.

lcx report --workdir=runs/quickstart
lcx report --workdir=runs/large --add='runs/small/eval/after.json' --add='runs/medium/eval/after.json'
"""

from __future__ import annotations

import glob
from collections.abc import Sequence

from absl import flags

from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.report.report import write_report


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "the run's workdir", flag_values=values)
    flags.DEFINE_multi_string("add", [], "an evaluation of another run to show as well, as a pattern", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Write the report."""
    given = [*([] if values.workdir is None else [values.workdir]), *rest]
    if not given:
        raise UserError("--workdir is missing; name the workdir of a run")
    if len(given) > 1:
        raise UserError(f"unexpected argument {given[1]!r} beside {given[0]}; a report is of one workdir")
    (workdir,) = given
    added = []
    for pattern in values.add:
        if not (found := sorted(glob.glob(pattern))):
            raise UserError(f"--add={pattern} matches no file; name evaluations such as runs/quickstart/eval/after.json")
        added += found
    say(f"report: {write_report(workdir, added)}")
