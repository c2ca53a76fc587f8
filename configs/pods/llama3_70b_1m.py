"""Llama 3 70B from 8,192 tokens to 1,048,576: the stages of Gradient's 8B, each at the critical base of its length.

Command:  lcx run --config=configs/pods/llama3_70b_1m.py --workdir=runs/llama3_70b_1m     (the same on every host)
          with the model in models/Meta-Llama-3-70B-Instruct and text, one JSON document a line, in data/long/*.jsonl
Hardware: TPU v5p, 128 chips (v5p:4x4x8).
Time:     51 h 51 min by `lcx plan` (docs/pods.md).
Result:   not run.
Source:   rows and steps of the model card of gradientai/Llama-3-8B-Instruct-Gradient-1048k; thetas by lcx.positions.theta.
"""

import dataclasses
import runpy
from pathlib import Path

from lcx.model.presets import family
from lcx.positions.theta import critical_base

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v5p:4x4x8"
SOURCE = "models/Meta-Llama-3-70B-Instruct"
LENGTH, THETA = 8192, 5e5


def get_config():
    """The 8B's options at the sizes of the 70B."""
    chosen = family("llama3_8b")
    model = dataclasses.replace(chosen.model, model_dim=8192, num_layers=80, num_heads=64, mlp_dim=28672)
    return BASE["recipe"](model, chosen.positions, SOURCE, stages(), schedule="constant")


def stages() -> dict:
    """1.4 billion tokens in all."""

    def stage(length: int, **sizes) -> dict:
        return BASE["stage"](length, critical_base(THETA, LENGTH, length), **sizes)

    return {
        "to_64k": stage(65_536, rows=32, steps=30, context=4, ulysses=4),
        "to_256k": stage(262_144, rows=16, steps=24, accumulate=2, context=16),
        "to_512k": stage(524_288, rows=16, steps=50, accumulate=4, context=32),
        "to_1m": stage(1_048_576, rows=16, steps=50, accumulate=8, context=64),
    }
