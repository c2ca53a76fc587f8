"""Convert a Hugging Face folder or a GGUF file to a run's checkpoint. Every command accepts any of them.

lcx import --source=models/Llama-3.2-1B --workdir=runs/llama [--dtype=float32]
lcx import --source=models/SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.gguf import stem
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.recipes.models import DTYPES, import_model


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("source", None, "directory with config.json and safetensors files, or a GGUF file", flag_values=values)
    flags.DEFINE_string("workdir", None, "directory of the run (default: runs/ plus the source's name)", flag_values=values)
    flags.DEFINE_string(
        "dtype", None, f"{', '.join(DTYPES)} (default: as stored; float32 for quantised weights)", flag_values=values
    )


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Import."""
    parse.nothing_left(rest, "import")
    source = Path(parse.needed(values, "source", "name a directory with config.json and safetensors files, or a GGUF file"))
    import_model(source, Path(values.workdir or Path("runs") / stem(source)), make_mesh(MeshConfig()), values.dtype)
