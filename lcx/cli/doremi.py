"""Find weights for the parts of a config's mixture by DoReMi: two runs of one stage, a reference and a reweighted proxy.

lcx doremi --config=configs/quickstart.py --workdir=runs/doremi [--stage=base_64] [--config.KEY=VALUE ...]

Rerun the same command to resume. The result is in WORKDIR/mixture.json, and printed as a line for the config.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.cli import config_flags, distributed_flags
from lcx.core.console import say, table
from lcx.recipes.cores import on_cores
from lcx.recipes.doremi import RESULT, find_mixture
from lcx.recipes.recipe import recipe
from lcx.training.doremi import DoReMiConfig


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    config_flags.define(values)
    default = DoReMiConfig()
    flags.DEFINE_string("stage", None, "stage whose parts are weighed (default: the first)", flag_values=values)
    flags.DEFINE_float("step_size", default.step_size, "how fast weights follow the excess loss", flag_values=values)
    flags.DEFINE_float("smoothing", default.smoothing, "share that every update spreads over all parts", flag_values=values)
    distributed_flags.define(values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Train both runs and print the weights."""
    chosen, workdir = config_flags.read(values, rest)
    run = on_cores(recipe(chosen).run)
    found = find_mixture(run, workdir, DoReMiConfig(values.step_size, values.smoothing), values.stage)
    stage = values.stage or run.stages[0].name
    before = {name: part.weight for name, part in run.data_of(next(one for one in run.stages if one.name == stage)).parts.items()}
    total = sum(before.values())
    rows = [(name, f"{before[name] / total:.1%}", f"{weight:.1%}") for name, weight in found.items()]
    table("weights of the parts", ("part", "config", "DoReMi"), rows)
    line = ", ".join(f"{name!r}: {weight:.4f}" for name, weight in found.items())
    say(f"config.stages.{stage}.mixture = {{{line}}}")
    say(f"kept in {workdir / RESULT}")
