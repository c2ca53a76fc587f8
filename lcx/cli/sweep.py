"""Run each unfinished point of a sweep in its own process, then print a table and draw a plot.

    lcx sweep --config=configs/sweeps/theta_length.py [--workdir=runs/theta_length]

The config file defines get_config(), the base of every point, and get_sweep(), the points (see `lcx.recipes.sweeps`).
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.cli import config_flags
from lcx.core.errors import UserError
from lcx.recipes.recipe import recipe
from lcx.recipes.sweeps import cli_argv, run_sweep


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values)
    flags.DEFINE_string("metric", None, "what to plot (default: needles, else perplexity, else loss)", flag_values=values)
    flags.DEFINE_float("timeout", None, "give up on a point after this many seconds", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Run the sweep."""
    base, workdir = config_flags.read(values, rest)
    loaded = config_flags.module(values)
    if not hasattr(loaded, "get_sweep"):
        raise UserError(f"{config_flags.filename(values)} has no get_sweep(); define it, or use a file in configs/sweeps")
    recipe(base)
    given = [word for word in config_flags.command() if word.startswith("--config.")]
    argv = cli_argv(values["config"].config_filename, "run", given)
    points = loaded.get_sweep()
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise UserError(
            f"get_sweep() of {config_flags.filename(values)} returned {points!r:.60}; make a list of points with lcx.recipes.sweeps"
        )
    run_sweep(points, base, workdir, argv, metric=values.metric, timeout=values.timeout)
