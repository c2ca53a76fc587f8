"""The smallest run that has everything: two stages, text and needles, a workdir.

Also a program: `python tiny.py WORKDIR ROWS` trains, and is killed as soon as `metrics.jsonl` has ROWS rows.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

SOURCE = {"kind": "stdlib", "limit_bytes": 300_000}


def config(**changes):
    """A run config as nested mappings; `changes` replace top-level entries."""
    values = {
        "model": {
            "vocab_size": 256,
            "model_dim": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 8,
            "mlp_dim": 32,
        },
        "positions": {"default": {"name": "rope", "theta": 100.0}},
        "data": {
            "parts": {
                "text": {"weight": 0.5, "source": SOURCE},
                "needles": {"kind": "multikey", "weight": 0.5, "source": SOURCE, "task": {"needles": 1, "queries": 1}},
            }
        },
        "stages": stages(),
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "checkpoint": {"every": 4},
        "metrics": {"writers": "jsonl", "peak_flops": 1e11},
        "mesh": {"fsdp": 1},
    }
    return {**values, **changes}


def stages(**longer):
    """Eight steps at 64 tokens, ten at 128; `longer` changes the second stage."""
    second = {"name": "longer", "seq_len": 128, "steps": 10, "batch_size": 4, "accumulate": 2, "positions": {"default": 400.0}}
    return [{"name": "base", "seq_len": 64, "steps": 8, "batch_size": 8}, {**second, **longer}]


def when_rows(workdir, rows, number):
    """Send this process a signal once `metrics.jsonl` has so many rows."""

    def watch():
        path = Path(workdir) / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < rows:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    import jax

    from lcx.training.loop import train
    from lcx.training.stages import run_config

    jax.config.update("jax_default_matmul_precision", "highest")
    when_rows(sys.argv[1], int(sys.argv[2]), signal.SIGKILL)
    train(run_config(config()), sys.argv[1], jax.devices()[:1])
