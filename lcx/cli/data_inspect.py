"""Show what a config's data mixture contains, counted over rows that a stage trains on: lengths, shares, fill, samples.

lcx data inspect --config=configs/quickstart.py --stage=extend_4096 --rows=256 --plot=mixture.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from lcx.cli import config_flags
from lcx.core.configs import choice
from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.data.loader import Loader
from lcx.data.report import COLUMNS, UPSAMPLING_COLUMNS, Report, compare_upsampling, inspect
from lcx.recipes.recipe import recipe
from lcx.report import style
from lcx.report.mixture_plot import mixture
from lcx.training.checks import warn_repeats
from lcx.training.stages import RunConfig


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values, workdir=False)
    flags.DEFINE_string("stage", None, "stage to inspect (default: the last)", flag_values=values)
    flags.DEFINE_integer("rows", 256, "rows to count, rounded up to whole steps", flag_values=values)
    flags.DEFINE_integer(
        "samples", 3, "sample documents to print from each part; of questions one of each skill", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("plot", None, "plot the length histograms and the shares to this PNG file", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Print the tables and draw the plot."""
    run = recipe(config_flags.chosen(values, rest)).run
    if values.rows < 1:
        raise UserError(f"--rows={values.rows} must be at least 1")
    if values.plot is not None and (not values.plot.endswith(".png") or not Path(values.plot).absolute().parent.is_dir()):
        raise UserError(f"--plot={values.plot} must end in .png and its directory must exist, as in --plot=mixture.png")
    loader = _loader(run, values.stage)
    report = inspect(loader, values.rows, values.samples)
    say(f"stage {run.stages[loader.stage_index].name}: rows of {report.seq_len:,} tokens, {report.fill_ratio:.2%} filled")
    _show(report)
    _show_upsampling(loader)
    _show_schedule(loader)
    warn_repeats(run.stages[loader.stage_index], loader)
    for part in report.parts:
        for sample in part.samples:
            say(f"\n{part.name} > {sample}")
    if values.plot is not None:
        style.save(mixture(report), values.plot)
        say(f"plot: {values.plot}")


def _loader(run: RunConfig, name: str | None) -> Loader:
    names = [stage.name for stage in run.stages]
    index = names.index(choice("--stage", names[-1] if name is None else name, names))
    stage = run.stages[index]
    return Loader(
        run.data_of(stage),
        stage.seq_len,
        stage.batch_size,
        run.seed,
        index,
        max_position=stage.max_position,
        schedule=run.schedule_of(stage),
    )


def _show(report: Report) -> None:
    table("parts of the mixture", COLUMNS, report.rows())
    columns = ("document length", *(part.name for part in report.parts))
    table("documents by length", columns, report.documents_by_length())
    table("share of all tokens by length", (*columns, "total"), report.shares_by_length())


def _show_upsampling(loader: Loader) -> None:
    """What each way of length upsampling would do to the mix, where some part thins its short documents."""
    config = loader.config
    if any(config.parts[name].short_keep < 1 for name in loader.names):
        rows = [
            (found.how, found.part, f"{found.tokens:.1%}", f"{found.long_documents:.2%}", f"{found.long_tokens:.1%}")
            for found in compare_upsampling(loader)
        ]
        table(f"length upsampling: {config.length_upsampling} is set, the others are for comparison", UPSAMPLING_COLUMNS, rows)


def _show_schedule(loader: Loader) -> None:
    """The shares of rows in each tenth of the stage, where weights change."""
    if loader.schedule is None:
        return
    steps = loader.schedule.steps
    rows = []
    for i in range(min(10, steps)):
        first, stop = i * steps // min(10, steps), (i + 1) * steps // min(10, steps)
        found = np.concatenate([loader.addresses(step)[0] for step in range(first, stop)])
        shares = np.bincount(found, minlength=len(loader.names)) / len(found)
        rows.append((f"{first + 1:,}-{stop:,}", *(f"{share:.1%}" for share in shares)))
    table("share of rows over the stage", ("steps", *loader.names), rows)
