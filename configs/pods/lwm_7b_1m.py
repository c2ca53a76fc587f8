"""LWM's text model: Llama 2 7B from 4,096 tokens to 1,048,576 in five stages of four million tokens a step.

Command:  lcx run --config=configs/pods/lwm_7b_1m.py --workdir=runs/lwm_7b_1m     (the same on every host)
          with the model in models/Llama-2-7b-hf and books, one JSON document a line, in data/long/*.jsonl
Hardware: TPU v4, 256 chips (v4:4x8x8), as the paper's v4-512.
Time:     72 h 55 min by `lcx plan` (docs/pods.md).
Result:   not run.
Source:   arXiv 2402.08268, the table of the text model's stages: thetas, steps, 33.6 billion tokens, learning rate 4e-5.
"""

import runpy
from pathlib import Path

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v4:4x8x8"
SOURCE = "models/Llama-2-7b-hf"


def get_config():
    """Every chip has 16,384 tokens of a row at each length."""
    return BASE["pod"]("llama2_7b", SOURCE, stages(), lr=4e-5, schedule="constant")


def stages() -> dict:
    """As in the paper; all chips of a row trade heads, up to the 32 that there are."""
    stage = BASE["stage"]
    return {
        "to_32k": stage(32_768, 1e6, rows=128, steps=1200, context=2, ulysses=2),
        "to_128k": stage(131_072, 10e6, rows=32, steps=3000, context=8, ulysses=8),
        "to_256k": stage(262_144, 10e6, rows=16, steps=3000, context=16, ulysses=16),
        "to_512k": stage(524_288, 25e6, rows=8, steps=720, context=32, ulysses=32),
        "to_1m": stage(1_048_576, 50e6, rows=4, steps=450, context=64, ulysses=32),
    }
