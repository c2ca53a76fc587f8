"""The run that plans are made of in tests: Llama 3.1 8B, one stage."""

from lcx.core import configs
from lcx.model.presets import family
from lcx.training.stages import run_config


def run(seq_len=1 << 20, *, batch_size=1, accumulate=1, mesh=None, execution=None, name="llama31_8b", model=None, **changes):
    """A run of one stage named `long`, in which all devices share a row unless `mesh` says otherwise."""
    chosen = family(name)
    return run_config(
        {
            "model": {**configs.plain(chosen.model), **(model or {})},
            "positions": configs.plain(chosen.positions),
            "execution": {"compute_dtype": "bfloat16", "remat": "block", **(execution or {})},
            "mesh": {"fsdp": 1, "context": -1, **(mesh or {})},
            "stages": [
                {"name": "long", "seq_len": seq_len, "steps": 10, "batch_size": batch_size, "accumulate": accumulate, **changes}
            ],
        }
    )


TINY = {"vocab_size": 256, "model_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 128}
