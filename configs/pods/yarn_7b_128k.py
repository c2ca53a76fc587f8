"""YaRN: Llama 2 7B from 4,096 tokens to 65,536 in 400 steps, and 200 more for 131,072, on rows of 65,536 tokens.

Command:  lcx run --config=configs/pods/yarn_7b_128k.py --workdir=runs/yarn_7b_128k     (the same on every host)
          with the model in models/Llama-2-7b-hf and books, one JSON document a line, in data/long/*.jsonl
Hardware: TPU v5e, 64 chips (v5e:8x8).
Time:     11 h 10 min by `lcx plan` (docs/pods.md).
Result:   not run.
Source:   arXiv 2309.00071: factors 16 and 32, 64 rows a step, learning rate 2e-5 without decay of weights, 20 steps of warmup.
"""

import runpy
from pathlib import Path

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v5e:8x8"
SOURCE = "models/Llama-2-7b-hf"


def get_config():
    """The longer model is trained on rows of the same length."""
    return BASE["pod"]("llama2_7b", SOURCE, stages(), schedule="constant", weight_decay=0.0, warmup_steps=20)


def stages() -> dict:
    """The factor is all that changes."""
    return {"to_64k": stage(16.0, steps=400), "to_128k": stage(32.0, steps=200, max_position=131_072)}


def stage(factor: float, **more) -> dict:
    """A stage under YaRN."""
    scheme = {"name": "yarn", "theta": 1e4, "factor": factor, "original_length": 4096}
    made = BASE["stage"](65_536, 1e4, rows=64, context=4, ulysses=4, accumulate=4, **more)
    return {**made, "positions": {"default": scheme}}
