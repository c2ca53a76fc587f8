"""Llama 3 8B from 8,192 tokens to 4,194,304 in Gradient's five stages: thetas, steps, rows and learning rate of their model cards.

Command:  lcx run --config=configs/pods/llama3_8b_4m.py --workdir=runs/llama3_8b_4m     (the same on every host)
          with the model in models/Meta-Llama-3-8B-Instruct and text, one JSON document a line, in data/long/*.jsonl
Hardware: TPU v5p, 64 chips (v5p:4x4x4).
Time:     33 h 41 min by `lcx plan` (docs/pods.md); Gradient took 22 hours on 8 to 512 L40S.
Result:   not run; Gradient's checkpoints find needles at every length of theirs.
Source:   the model cards of gradientai/Llama-3-8B-Instruct-Gradient-1048k and -4194k.
"""

import runpy
from pathlib import Path

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v5p:4x4x4"
SOURCE = "models/Meta-Llama-3-8B-Instruct"


def get_config():
    """Gradient's stages; rows are shared by more devices as they get longer."""
    return BASE["pod"]("llama3_8b", SOURCE, stages(), schedule="constant")


def stages() -> dict:
    """1.6 billion tokens in all."""
    stage = BASE["stage"]
    return {
        "to_64k": stage(65_536, 15.3e6, rows=32, steps=30, context=8),
        "to_256k": stage(262_144, 207.1e6, rows=16, steps=24, accumulate=4, context=16),
        "to_512k": stage(524_288, 1.06e9, rows=16, steps=50, accumulate=8, context=32),
        "to_1m": stage(1_048_576, 2.80e9, rows=16, steps=50, accumulate=16, context=64),
        "to_4m": stage(4_194_304, 45.2e9, rows=4, steps=12, accumulate=4, context=64),
    }
