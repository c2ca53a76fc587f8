"""What both sides of the benchmark of generation share: sizes, random weights and prompts in NumPy, and how a side answers.

Legend: L layers, D model, N heads, K key-value heads, H head dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from side import answer, peak_memory

MODEL = dict(vocab_size=32000, model_dim=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1536)
THETA = 10000.0

Generate = Callable[[Callable[[], None]], list[list[int]]]
"""Greedy tokens of every prompt; calls back once, when the first token of each is there."""


def weights() -> dict[str, np.ndarray]:
    """float32, layers stacked, every matrix as `[in, out]`."""
    L, D, F, V = (MODEL[name] for name in ("num_layers", "model_dim", "mlp_dim", "vocab_size"))
    N, K, H = (MODEL[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    rng = np.random.default_rng(0)
    shapes = {
        "query": (L, D, N * H), "key": (L, D, K * H), "value": (L, D, K * H), "out": (L, N * H, D),
        "up": (L, D, F), "gate": (L, D, F), "down": (L, F, D), "head": (D, V),
    }  # fmt: skip
    drawn = {name: rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5) for name, shape in shapes.items()}
    return {**drawn, "embedding": rng.standard_normal((V, D), np.float32)}


def prompts(rows: int, length: int) -> np.ndarray:
    """Random tokens int32 `[rows, length]`."""
    return np.random.default_rng(1).integers(0, MODEL["vocab_size"], (rows, length), dtype=np.int32)


def serve(build: Callable[[int, int, int], tuple[Generate, dict[str, Any]]]) -> None:
    """Build `generate` for the case in `argv[1]`, warm it up, and time a round for each line of standard input.

    `build(rows, length, new)` gets the case. A round is one generation: up to the first tokens it is prefill, then decoding.
    Answers are JSON lines: facts and tokens, then the seconds of each round on the clock and of the processor.
    """
    case = json.loads(sys.argv[1])
    baseline = peak_memory()
    generate, facts = build(case["rows"], case["length"], case["new"])
    answer({**facts, "tokens": generate(lambda: None)})
    for _ in sys.stdin:
        marks = [_now()]
        generate(lambda marks=marks: marks.append(_now()))
        marks.append(_now())
        (wall, cpu), (first_wall, first_cpu), (last_wall, last_cpu) = marks
        answer(
            {
                "prefill": first_wall - wall, "prefill_cpu": first_cpu - cpu,
                "decode": last_wall - first_wall, "decode_cpu": last_cpu - first_cpu,
            }
        )  # fmt: skip
    answer({"peak_bytes": peak_memory() - baseline})


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
