"""Train the stages of a config, without evaluating. Rerun the same command to resume.

lcx train --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.cli import config_flags, distributed_flags
from lcx.core.host import process_start
from lcx.recipes.cores import on_cores
from lcx.recipes.models import initial_weights
from lcx.recipes.recipe import recipe
from lcx.training.goodput import Recorder
from lcx.training.loop import train
from lcx.training.profile import profile_steps


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values)
    config_flags.define_profile(values)
    distributed_flags.define(values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Train."""
    chosen, workdir = config_flags.read(values, rest)
    run = on_cores(recipe(chosen).run)
    profile, fewer = profile_steps(values.profile), config_flags.fewer_steps(values)
    with Recorder(process_start()) as record:
        train(run, workdir, given=initial_weights(run.init_from), profile=profile, fewer=fewer, record=record)
