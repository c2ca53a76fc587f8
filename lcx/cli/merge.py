"""Merge models tensor by tensor into a new Hugging Face folder, as mergekit's YAML says.

lcx merge --config=merge.yml --out=models/merged [--dry_run]
lcx merge --config=merge.yml --out=models/merged --tune='held_out/*.txt'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.errors import UserError
from lcx.interop.folder import refuse_full_disk
from lcx.merging.merge import Merge


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "config", None, "YAML file with merge_method, models and parameters; see docs/merging.md", flag_values=values
    )
    flags.DEFINE_string("out", None, "directory to create", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "show what would be merged with which parameters, and write nothing", flag_values=values)
    flags.DEFINE_multi_string(
        "tune",
        [],
        "text files, as a pattern, by whose loss weights are searched for, one for each layer; they are written to NAME.tuned.yml, "
        "and the merge is made with them",
        flag_values=values,
    )
    flags.DEFINE_integer("tune_steps", None, "steps of the search (default: 100)", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("tune_length", None, "tokens of a row of its text (default: up to 512)", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("tune_tokens", None, "tokens of its text (default: 32,768)", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "max_shard_gb", 5.0, "maximum size of a file of the directory in gigabytes", lower_bound=1e-6, flag_values=values
    )


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Merge."""
    parse.nothing_left(rest, "merge")
    path = parse.needed(values, "config", "name a YAML file such as merge.yml")
    out = Path(parse.needed(values, "out", "name a new directory"))
    sizes = {name: values[f"tune_{flag}"].value for name, flag in (("steps", "steps"), ("seq_len", "length"), ("tokens", "tokens"))}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    merge = Merge(path)
    if sizes and not values.tune:
        raise UserError("--tune_steps, --tune_length and --tune_tokens belong to --tune, which is not given; name its text")
    if values.tune:
        if values.dry_run:
            raise UserError("--dry_run and --tune conflict: a search reads the models; leave one of them out")
        refuse_full_disk(out, merge.bytes)
        # Loaded only now: a merge needs no model that computes.
        from lcx.recipes.merge_search import SearchConfig, search

        merge = Merge(search(merge, SearchConfig(tuple(values.tune), **sizes))[0])
    if values.dry_run:
        merge.show(out)
    else:
        merge.write(out, int(values.max_shard_gb * 1e9))
