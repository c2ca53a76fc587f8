"""Train the stages of a config, evaluate the model before and after, and write the report. Rerun the same command to resume.

lcx run --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from lcx.cli import config_flags, distributed_flags
from lcx.core.host import process_start
from lcx.recipes.cores import on_cores
from lcx.recipes.recipe import recipe, run_recipe
from lcx.training.profile import profile_steps


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values)
    config_flags.define_profile(values)
    distributed_flags.define(values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Run the recipe."""
    config, workdir = config_flags.read(values, rest)
    profile, fewer = profile_steps(values.profile), config_flags.fewer_steps(values)
    chosen = recipe(config)
    chosen = dataclasses.replace(chosen, run=on_cores(chosen.run))
    run_recipe(chosen, workdir, config_flags.command(), profile, fewer, process_start())
