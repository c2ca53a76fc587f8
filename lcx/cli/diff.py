"""Compare two models tensor by tensor: runs, their checkpoint folders, Hugging Face folders or GGUF files, in any pairing.

lcx diff ONE OTHER
lcx diff runs/extend_hf models/Llama-3.2-1B
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.core.errors import UserError
from lcx.recipes.diff import diff


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_bool("all", False, "also list equal tensors", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Compare the two models; exit with status 1 if they differ."""
    if len(rest) != 2:
        raise UserError(f"lcx diff takes two models but got {len(rest)}; use lcx diff ONE OTHER")
    same = diff(*rest, show_all=values.all)
    if not same:
        raise SystemExit(1)
