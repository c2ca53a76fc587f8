"""Show what a config's data mixture contains, counted over rows that a stage trains on: lengths, shares, fill, samples.

lcx data inspect --config=configs/quickstart.py --stage=extend_4096 --rows=256 --plot=mixture.png --html=mixture.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import config_flags
from lcx.core.configs import choice
from lcx.core.console import say, table
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.data.loader import Loader
from lcx.data.report import COLUMNS, UPSAMPLING_COLUMNS, Report, compare_upsampling, inspect, shares_over_stage
from lcx.recipes.recipe import recipe
from lcx.report import mixture_page, style
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
    flags.DEFINE_string("html", None, "write a page with all of it, and rows to read, to this HTML file", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Print the tables and draw the plot."""
    run = recipe(config_flags.chosen(values, rest)).run
    if values.rows < 1:
        raise UserError(f"--rows={values.rows} must be at least 1")
    _check(values, "plot", ".png")
    _check(values, "html", ".html")
    loader = _loader(run, values.stage)
    stage = run.stages[loader.stage_index]
    report = inspect(loader, values.rows, values.samples)
    say(f"stage {stage.name}: rows of {report.seq_len:,} tokens, {report.fill_ratio:.2%} filled")
    _show(report)
    _show_upsampling(loader)
    _show_schedule(loader)
    warn_repeats(stage, loader)
    for part in report.parts:
        for sample in part.samples:
            say(f"\n{part.name} > {sample}")
    if values.plot is not None:
        style.save(mixture(report), values.plot)
        say(f"plot: {values.plot}")
    if values.html is not None:
        content = mixture_page.render(mixture_page.collect(stage.name, stage.steps, loader, report))
        # Names of files may hold bytes that are not UTF-8.
        write_atomically(values.html, content.encode("utf-8", "backslashreplace"))
        say(f"page to look at: {values.html}")


def _check(values: flags.FlagValues, name: str, ending: str) -> None:
    """Raises `UserError` for a file that could not be written, before time is spent on what it is to hold."""
    path = values[name].value
    if path is not None and (not path.endswith(ending) or not Path(path).absolute().parent.is_dir()):
        raise UserError(f"--{name}={path} must end in {ending} and its directory must exist, as in --{name}=mixture{ending}")


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
    rows = [(f"{first:,}-{last:,}", *(f"{share:.1%}" for share in shares)) for first, last, shares in shares_over_stage(loader)]
    if rows:
        table("share of rows over the stage", ("steps", *loader.names), rows)
