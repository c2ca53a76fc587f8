"""Merge models tensor by tensor into a new Hugging Face folder, as mergekit's YAML says.

lcx merge --config=merge.yml --out=models/merged [--dry_run]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.merging.merge import Merge


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "config", None, "YAML file with merge_method, models and parameters; see docs/merging.md", flag_values=values
    )
    flags.DEFINE_string("out", None, "directory to create", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "show what would be merged with which parameters, and write nothing", flag_values=values)
    flags.DEFINE_float(
        "max_shard_gb", 5.0, "maximum size of a file of the directory in gigabytes", lower_bound=1e-6, flag_values=values
    )


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Merge."""
    parse.nothing_left(rest, "merge")
    path = parse.needed(values, "config", "name a YAML file such as merge.yml")
    out = Path(parse.needed(values, "out", "name a new directory"))
    merge = Merge(path)
    if values.dry_run:
        merge.show(out)
    else:
        merge.write(out, int(values.max_shard_gb * 1e9))
