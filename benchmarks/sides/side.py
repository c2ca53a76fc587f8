"""What both sides of the benchmark share: the model's sizes, the batches, and how a side answers the driver.

Imports nothing beyond NumPy, so that either side's interpreter can load it. Legend: B batch rows, T tokens.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

MODEL = dict(vocab_size=256, model_dim=256, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=32, mlp_dim=1024)
"""A Llama of bytes: with 256 entries the output layer costs next to nothing, so the figures are those of the layers."""

NORM_EPS = 1e-5
THETA = 500000.0
OPTIMIZER = dict(lr=1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(rows: int, length: int) -> Iterator[np.ndarray]:
    """Random bytes int32 `[B, T + 1]`, the same on both sides; four batches in turn."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, MODEL["vocab_size"], (rows, length + 1), dtype=np.int32) for _ in range(4)]
    while True:
        yield from drawn


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(build: Callable[..., tuple[Callable[[], float], dict[str, Any]]], warm: int = 2) -> None:
    """Build a step for the case in `argv[1]`, run it `warm` times, and time as many steps as each line of standard input asks for.

    `build(**case)`, called after all imports, returns `step() -> loss`, which waits until the step is done, and facts about
    the side. Answers are JSON lines: the facts with the first losses, then the seconds of each round, and when the input
    ends the peak memory beyond that after the imports (compilation and warm-up included).
    """
    case = json.loads(sys.argv[1])
    baseline = peak_memory()
    start = time.perf_counter()
    step, facts = build(**case)
    losses = [step() for _ in range(warm)]
    answer({**facts, "losses": losses, "start_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        step()  # not timed: a virtual machine may have taken back the memory that lay free while the other side ran
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        answer({"seconds": time.perf_counter() - start})
    answer({"baseline_bytes": baseline, "peak_bytes": peak_memory() - baseline})


def answer(message: dict[str, Any]) -> None:
    """One JSON line to the driver."""
    print(json.dumps(message), flush=True)
