"""Train the stages of a config, without evaluations. The same command resumes.

lcx train --config=configs/quickstart.py --workdir=runs/quickstart [--config.KEY=VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.cli import config
from lcx.research.recipe import recipe, train_recipe


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config.define(values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Train."""
    chosen, workdir = config.read(values, rest)
    train_recipe(recipe(chosen), workdir)
