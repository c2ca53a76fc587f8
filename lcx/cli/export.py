"""Write a run's weights as a Hugging Face folder, which transformers and vLLM load.

lcx export --checkpoint=runs/extend_hf --out=models/Llama-3.2-1B-64K [--stage=extend_65536] [--dtype=bfloat16]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.recipes.models import DTYPES, export_model


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("checkpoint", None, "a run's workdir or one of its checkpoints", flag_values=values)
    flags.DEFINE_string("out", None, "directory to create", flag_values=values)
    flags.DEFINE_string("stage", None, "use the weights from the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_integer("step", None, "use the weights from this step", flag_values=values)
    flags.DEFINE_string("dtype", None, f"{', '.join(DTYPES)} (default: that of the source model, else float32)", flag_values=values)
    flags.DEFINE_float("max_shard_gb", 2.0, "maximum size of a file in gigabytes", lower_bound=1e-6, flag_values=values)


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Export."""
    parse.nothing_left(rest, "export")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir")
    out = Path(parse.needed(values, "out", "name a new directory"))
    size = int(values.max_shard_gb * 1e9)
    export_model(checkpoint, out, values.step, values.stage, make_mesh(MeshConfig()), values.dtype, size)
