"""SmolLM2 135M Instruct from 8,192 tokens to 32,768 and to 131,072: the smallest model of this folder, for four chips.

Command:  lcx run --config=configs/pods/smollm2_135m_128k.py --workdir=runs/smollm2_135m_128k
          with the model in models/SmolLM2-135M-Instruct and text, one JSON document a line, in data/long/*.jsonl
Hardware: TPU v5e, 4 chips (v5e:2x2); a laptop takes short rows in its place (configs/real_model.py).
Time:     90 min by `lcx plan` (docs/pods.md).
Result:   not run.
Source:   config.json of HuggingFaceTB/SmolLM2-135M-Instruct; each stage at the critical base of its length (arXiv 2310.05209).
"""

import runpy
from pathlib import Path

from lcx.model.config import ModelConfig
from lcx.positions.theta import critical_base

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v5e:2x2"
SOURCE = "models/SmolLM2-135M-Instruct"
LENGTH, THETA = 8192, 1e5
MODEL = ModelConfig(
    vocab_size=49152, model_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536, norm_eps=1e-5,
    tied_embeddings=True,
)  # fmt: skip


def get_config():
    """Nine heads divide over no four chips: a ring goes through all of them."""
    positions = {"default": f"rope:theta={THETA}"}
    return BASE["recipe"](MODEL, positions, SOURCE, stages(), lr=1e-4, schedule="cosine", warmup_steps=20)


def stages() -> dict:
    """Half a million tokens a step."""

    def stage(length: int, rows: int, accumulate: int) -> dict:
        theta = critical_base(THETA, LENGTH, length)
        return BASE["stage"](length, theta, rows=rows, steps=200, context=4, ulysses=1, accumulate=accumulate)

    return {"to_32k": stage(32_768, 16, 8), "to_128k": stage(131_072, 4, 4)}
