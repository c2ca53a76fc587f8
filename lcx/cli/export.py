"""Write a run's weights as a Hugging Face folder for transformers and vLLM, as a GGUF file for llama.cpp, or its adapters for peft.
With it comes a model card: what was done, what was measured, and how the model is served.

lcx export --checkpoint=runs/extend_hf --out=models/Llama-3.2-1B-64K [--stage=extend_65536] [--dtype=bfloat16]
lcx export --checkpoint=runs/extend_hf --format=gguf --out=models/Llama-3.2-1B-64K.gguf [--dtype=q8_0]
lcx export --checkpoint=runs/adapter --format=peft --out=models/adapter [--base=models/Llama-3.2-1B]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lcx.cli import parse
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.recipes.models import DTYPES, FORMATS, export_model


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("checkpoint", None, "a run's workdir or one of its checkpoints", flag_values=values)
    flags.DEFINE_string("out", None, "directory to create, or file that ends in .gguf", flag_values=values)
    flags.DEFINE_string("format", "hf", f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}", flag_values=values)
    flags.DEFINE_string("base", None, "folder of the model below an adapter (default: what the run began with)", flag_values=values)
    about = "name on the Hub, for the model card, of the model that the run began with"
    flags.DEFINE_string("base_model", None, about, flag_values=values)
    flags.DEFINE_string("stage", None, "use the weights from the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_integer("step", None, "use the weights from this step", flag_values=values)
    dtypes = f"{', '.join(DTYPES)}; as gguf also q8_0 (default: that of the source model, else float32)"
    flags.DEFINE_string("dtype", None, dtypes, flag_values=values)
    flags.DEFINE_float(
        "max_shard_gb", 2.0, "maximum size of a file of the directory in gigabytes", lower_bound=1e-6, flag_values=values
    )


def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Export."""
    parse.nothing_left(rest, "export", "checkpoint")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir")
    out = Path(parse.needed(values, "out", "name a new directory or file"))
    size = int(values.max_shard_gb * 1e9)
    mesh = make_mesh(MeshConfig())
    export_model(
        checkpoint, out, values.step, values.stage, mesh, values.dtype, size, values.format, values.base, values.base_model
    )
