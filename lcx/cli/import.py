"""Turn a Hugging Face folder into a run's checkpoint, which every command takes (they take the folder as well).

lcx import --source=models/Llama-3.2-1B --workdir=runs/llama [--dtype=float32]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.recipes.models import DTYPES, import_model


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("source", None, "a folder with config.json and safetensors files", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the checkpoint is kept (default: runs/ and the folder's name)", flag_values=values)
    flags.DEFINE_string("dtype", None, f"{', '.join(DTYPES)} (default: as stored)", flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Import."""
    parse.nothing_left(rest, "import")
    source = Path(parse.needed(values, "source", "name a folder with config.json and safetensors files"))
    import_model(source, Path(values.workdir or Path("runs") / source.name), make_mesh(MeshConfig()), values.dtype)
