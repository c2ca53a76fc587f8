"""What both sides of the benchmark of filters share: the documents, and how a side answers. Standard library alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("gopher_quality", "gopher_repetition", "fineweb", "c4")
"""The filters in the order in which a document meets them."""

Judge = Callable[[str, tuple[str, ...]], str | None]
"""A text and the names of filters -> `FILTER:REASON` of the first that drops it, None if all keep it."""


def serve(judge: Judge, versions: dict[str, str]) -> None:
    """Judge the documents of the case in `argv[1]` (a JSONL file) once for each line of input, which names filters.

    Answers are JSON lines: facts after a first document, then seconds on the clock and of the processor, with the reasons.
    """
    case = json.loads(sys.argv[1])
    with Path(case["documents"]).open() as file:
        texts = [json.loads(line)["text"] for line in file]
    judge(texts[0], NAMES)
    _answer({"versions": versions, "documents": len(texts)})
    for line in sys.stdin:
        names = tuple(line.split())
        wall, cpu = time.perf_counter(), time.process_time()
        reasons = [judge(text, names) for text in texts]
        _answer({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "reasons": reasons})
    _answer({})


def _answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
