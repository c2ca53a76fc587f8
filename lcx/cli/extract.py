"""Extract what a fine-tune adds to its base: a low-rank adapter in peft's files, or the differences, all or the largest.

lcx extract BASE TUNED --out=DIR
lcx extract models/Llama-3-8B models/Llama-3-8B-1M --out=models/context --rank=64
lcx extract models/Llama-3-8B models/Llama-3-8B-1M --out=models/context --energy=0.99 | --full | --sparse=0.1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.errors import UserError
from lcx.core.numbers import counted
from lcx.merging.extract import Extraction, show


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "directory to create", flag_values=values)
    flags.DEFINE_integer("rank", None, "rank of the adapter of every matrix", flag_values=values)
    flags.DEFINE_float("energy", None, "least rank that keeps this share of the squared singular values", flag_values=values)
    flags.DEFINE_bool("embed", False, "adapt embeddings and output layer too, in place of saving them whole", flag_values=values)
    flags.DEFINE_bool("full", False, "write all differences as they are, in float32", flag_values=values)
    flags.DEFINE_float("sparse", None, "write this share of the differences, the largest of each tensor", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Extract."""
    if len(rest) != 2:
        got = counted(len(rest), "model")
        raise UserError(f"lcx extract takes a base and its fine-tune but got {got}; use lcx extract BASE TUNED --out=DIR")
    out = Path(parse.needed(values, "out", "name a new directory"))
    forms = {"rank": values.rank, "energy": values.energy, "full": values.full or None, "sparse": values.sparse}
    chosen = [name for name, value in forms.items() if value is not None]
    if len(chosen) != 1:
        got = "none was given" if not chosen else f"--{', --'.join(chosen[:-1])} and --{chosen[-1]} were"
        raise UserError(f"give one of --rank=R, --energy=SHARE, --full and --sparse=SHARE; {got}")
    if values.embed and chosen[0] in ("full", "sparse"):
        raise UserError(f"--embed is for adapters; --{chosen[0]} has all tensors anyway, so omit it")
    extraction = Extraction(*rest)
    if values.full:
        extraction.full(out)
    elif values.sparse is not None:
        extraction.sparse(out, values.sparse)
    else:
        show(extraction.adapter(out, values.rank, values.energy, values.embed))
