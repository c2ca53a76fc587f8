"""Qwen2.5 7B from 32,768 tokens to 262,144 in three stages, and to 1,048,576 without training, by dual chunk attention.

Command:  lcx run --config=configs/pods/qwen25_7b_1m.py --workdir=runs/qwen25_7b_1m     (the same on every host)
          with the model in models/Qwen2.5-7B and text, one JSON document a line, in data/long/*.jsonl
Hardware: TPU v5e, 256 chips (v5e:16x16).
Time:     5 h 02 min by `lcx plan` (docs/pods.md).
Result:   not run.
Source:   the Qwen2.5-1M report: lengths, thetas, three quarters of the rows at full length. It does not say how many tokens its
          stages have; a billion each, here, is what UltraLong's stages have (arXiv 2504.06214).
"""

import runpy
from pathlib import Path

from lcx.recipes.recipe import part

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v5e:16x16"
SOURCE = "models/Qwen2.5-7B"


def get_config():
    """28 heads and 4 of keys: four chips trade heads, and a ring goes through the others of a row."""
    config = BASE["pod"]("qwen25_7b", SOURCE, stages(), lr=1e-5, schedule="cosine")
    text = {"kind": "jsonl", "path": "data/long/*.jsonl"}
    config.data.parts = {
        "long": part(weight=0.75, source=text, min_tokens=32_768),
        "short": part(weight=0.25, source=text, max_tokens=32_768),
    }
    config.evals.lengths = (32_768, 131_072, 262_144, 1_048_576)
    config.evals.zero_shot = ("dual_chunk",)
    return config


def stages() -> dict:
    """Four million tokens a step."""

    def stage(length: int, theta: float, rows: int, context: int) -> dict:
        return BASE["stage"](length, theta, rows=rows, steps=250, context=context, ulysses=4)

    return {
        "to_64k": stage(65_536, 1e6, rows=64, context=4),
        "to_128k": stage(131_072, 5e6, rows=32, context=8),
        "to_256k": stage(262_144, 10e6, rows=16, context=16),
    }
