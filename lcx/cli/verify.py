"""Compare checkpoints, models and data with the checksums that were written with them; exit with status 1 if any is damaged.

lcx verify DIR [--update]      DIR is a run, its checkpoints or one of them, an export, prepared data, or a GGUF file
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from lcx.core.errors import UserError
from lcx.recipes.verify import verify


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_bool("update", False, "accept files changed on purpose: write the manifests anew", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Compare all that is there."""
    if len(rest) != 1:
        raise UserError(f"lcx verify takes one folder or GGUF file but got {len(rest)}; use lcx verify DIR")
    if not verify(rest[0], values.update):
        raise SystemExit(1)
