"""A run of twenty steps over three stages whose metrics are kept, so that a change of any number shows.

`python -m tests.training.golden` writes `golden.json` again, for a change that means to change numbers.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcx.recipes.recipe import defaults, part, recipe
from lcx.training import metrics
from lcx.training.loop import train

KEPT = Path(__file__).with_name("golden.json")
FIELDS = ("stage", "stage_step", "seq_len", "theta", "loss", "accuracy", "grad_norm", "lr", "weight", "ok")


def write_corpus(folder: Path) -> None:
    """Text that is the same on every machine: words of random letters in lines, forty documents."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     \n", np.uint8)
    for number in range(40):
        (folder / f"{number:02d}.txt").write_bytes(letters[rng.integers(0, len(letters), 2000)].tobytes())


def config(corpus: Path) -> Any:
    """Local layers with learned biases and global ones with rotary positions, GQA, sinks, softcap, text and needles."""
    stages = {
        "base": dict(seq_len=64, batch_size=8, steps=8, optim={"lr": 3e-3, "warmup_steps": 2}),
        "theta": dict(seq_len=128, batch_size=4, steps=6, positions={"global": 800.0}, keep_optimizer_state=True, accumulate=2),
        "yarn": dict(seq_len=256, batch_size=2, steps=6, positions={"global": "yarn:factor=4,original_length=64"}),
    }
    sizes = dict(model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64)
    chosen = defaults(stages, **sizes, pattern=("local", "global"), window=16, attention_softcap=20.0, sinks=True)
    chosen.positions = {"local": {"name": "t5", "focus": 8.0}, "global": {"name": "rope", "theta": 350.0}}
    source = {"kind": "text", "path": str(corpus / "*.txt")}
    chosen.data.parts = {
        "text": part(kind="text", weight=0.5, source=source, packing={"mask_documents": True}),
        "needles": part(kind="multikey", weight=0.5, source=source, task={"needles": 2, "queries": 2}),
    }
    chosen.metrics.writers = "jsonl"
    chosen.metrics.peak_flops = 1e12
    chosen.checkpoint.every = None
    return chosen


def curve(folder: Path) -> list[dict[str, Any]]:
    """The kept fields of every step of the run, which is made in `folder`."""
    corpus = folder / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    train(recipe(config(corpus)).run, folder / "run", jax.devices()[:1])
    return [{name: row[name] for name in FIELDS} for row in metrics.read(folder / "run" / "metrics.jsonl")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        rows = curve(Path(made))
    KEPT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
