"""What both sides of the benchmark of evaluation share: the prompts that the driver has written, and how a side answers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from side import answer, peak_memory

Ask = Callable[[Sequence[np.ndarray], int], list[str]]
"""Greedy answers in words to prompts, each up to so many tokens."""


def serve(build: Callable[[dict[str, Any]], tuple[Ask, dict[str, Any]]]) -> None:
    """Build `ask` for the case in `argv[1]`, and let it answer the groups that lines of standard input name.

    The case's `prompts` is a JSON file of groups by name: `prompts`, lists of token ids, and `new_tokens`. To have programs
    compiled, beginnings and ends of the first group's prompts are answered before. Answers are JSON lines: facts with the seconds
    of that, then texts and seconds of each group.
    """
    case = json.loads(sys.argv[1])
    groups = json.loads(Path(case["prompts"]).read_text())
    rows = {name: [np.asarray(row, np.int32) for row in group["prompts"]] for name, group in groups.items()}
    baseline = peak_memory()
    ask, facts = build(case)
    start = time.perf_counter()
    first = next(iter(rows.values()))
    half, common = min(map(len, first)) // 2, len(os.path.commonprefix([row.tolist() for row in first]))
    # What differs between the prompts stays as long as it is, as programs depend on it.
    ask([np.concatenate([row[:half], row[common if common > half else -64 :]]) for row in first], 8)
    answer({**facts, "start_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        name, start = line.strip(), time.perf_counter()
        texts = ask(rows[name], groups[name]["new_tokens"])
        answer({"texts": texts, "seconds": time.perf_counter() - start})
    answer({"peak_bytes": peak_memory() - baseline})
