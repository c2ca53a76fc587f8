"""Run each unfinished point of a sweep in its own process, then print a table and draw a plot.

    lcx sweep --config=configs/sweeps/theta_length.py [--workdir=runs/theta_length]

The config file defines get_config(), the base of every point, and get_sweep(), the points (see `lcx.recipes.sweeps`).
With --engine=ray the points are tasks of a Ray cluster whose machines all see the workdir; lcx launch --sweep makes each point a
job of its own, after which --collect makes the table and the plot.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from absl import flags

from lcx.cli import config_flags
from lcx.core.errors import UserError
from lcx.data.curation import cluster
from lcx.recipes.recipe import recipe
from lcx.recipes.sweeps import cli_argv, points_of, run_sweep


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values)
    flags.DEFINE_string("metric", None, "what to plot (default: needles, else perplexity, else loss)", flag_values=values)
    flags.DEFINE_float("timeout", None, "give up on a point after this many seconds", flag_values=values)
    flags.DEFINE_bool("collect", False, "run nothing: show what finished points left", flag_values=values)
    flags.DEFINE_enum("engine", "here", ["here", "ray"], "where points run, one after the other here or on Ray", flag_values=values)
    flags.DEFINE_string(
        "ray_address", None, "of a running Ray cluster, HOST:PORT or auto (default: RAY_ADDRESS)", flag_values=values
    )
    flags.DEFINE_integer("workers", None, "ray: points that run at once (default: as many as fit)", flag_values=values)
    flags.DEFINE_float("point_cpus", 1.0, "ray: cores that a point takes", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float("point_gpus", 0.0, "ray: GPUs that a point takes", lower_bound=0.0, flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Run the sweep."""
    _refuse_rays_alone(values)
    base, workdir = config_flags.read(values, rest)
    points = points_of(config_flags.module(values), config_flags.filename(values))
    recipe(base)
    if values.collect and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist, so there is nothing to collect; name the workdir of a sweep")
    argv = cli_argv(values["config"].config_filename, "run", config_flags.overrides(values))
    ray = cluster.engine(values.ray_address, values.workers, num_cpus=values.point_cpus, num_gpus=values.point_gpus)
    with ray if values.engine == "ray" else contextlib.nullcontext(map) as runner:
        outcomes = run_sweep(
            points, base, workdir, argv, metric=values.metric, timeout=values.timeout, runner=runner, only_collect=values.collect
        )
    if not values.collect and any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


def _refuse_rays_alone(values: flags.FlagValues) -> None:
    """Raises `UserError` for a flag of Ray's without it."""
    if values.collect and values.engine == "ray":
        raise UserError("--collect runs nothing, so --engine=ray has no effect; leave one of them out")
    for name in ("ray_address", "workers", "point_cpus", "point_gpus"):
        if values[name].present and values.engine != "ray":
            raise UserError(f"--{name}={values[name].value} needs --engine=ray; add it")
    if values.workers is not None and values.workers < 1:
        raise UserError(f"--workers={values.workers} must be at least 1")
