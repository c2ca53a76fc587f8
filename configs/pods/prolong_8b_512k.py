"""ProLong: Llama 3 8B Instruct from 8,192 tokens to 65,536 and to 524,288, 20 billion tokens each.

Command:  lcx run --config=configs/pods/prolong_8b_512k.py --workdir=runs/prolong_8b_512k     (the same on every host)
          with the model in models/Meta-Llama-3-8B-Instruct, and in data/prolong a folder of JSON lines for each of code (whole
          repositories), books, textbooks and short
Hardware: TPU v5p, 64 chips (v5p:4x4x4).
Time:     240 h 07 min by `lcx plan` (docs/pods.md).
Result:   not run.
Source:   arXiv 2410.02660 and the scripts of princeton-nlp/ProLong: the second stage goes on with the optimizer's state, restarts
          the schedule at 5e-6, and takes 8 million tokens a step; its long rows are half of the code and a sixth of the books.
"""

import runpy
from pathlib import Path

from lcx.recipes.recipe import part

BASE = runpy.run_path(str(Path(__file__).parent / "base.py"))
TOPOLOGY = "v5p:4x4x4"
SOURCE = "models/Meta-Llama-3-8B-Instruct"
MASKED = {"method": "best_fit", "mask_documents": True}


def get_config():
    """Documents do not see one another; the short mix is 37% and textbooks 3%."""
    config = BASE["pod"]("llama3_8b", SOURCE, stages(), lr=1e-5, schedule="cosine", end_fraction=0.1)
    config.data.parts = {
        "code": text("code", 0.30, min_tokens=65_536),
        "books": text("books", 0.30, min_tokens=65_536),
        "long_code": text("code", 0.0, min_tokens=524_288),
        "long_books": text("books", 0.0, min_tokens=524_288),
        "textbooks": text("textbooks", 0.03),
        "short": text("short", 0.37),
    }
    config.stages.to_512k.mixture = {"code": 0.15, "long_code": 0.15, "books": 0.25, "long_books": 0.05}
    return config


def stages() -> dict:
    """Four million tokens a step, then eight."""
    stage = BASE["stage"]
    return {
        "to_64k": stage(65_536, 8e6, rows=64, steps=5000, context=8, accumulate=2, optim={"warmup_steps": 500}),
        "to_512k": stage(
            524_288, 128e6, rows=16, steps=2500, context=32, accumulate=8, keep_optimizer_state=True,
            optim={"lr": 5e-6, "warmup_steps": 250},
        ),
    }  # fmt: skip


def text(folder: str, weight: float, **more):
    """Packed documents of a folder."""
    source = {"kind": "jsonl", "path": f"data/prolong/{folder}/*.jsonl"}
    return part(weight=weight, source=source, packing=MASKED, **more)
