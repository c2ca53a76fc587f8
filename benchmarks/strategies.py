"""Whether `auto` takes the fastest strategy for a split sequence: each of them timed, forward and backward, over a grid.

    python benchmarks/strategies.py                  8 host devices; tokens on each x KV heads x mask, about ten minutes
    python benchmarks/strategies.py --tokens=256     ... of one size

All strategies of a cell take the same arrays in one process, in turns; a figure is the best of `--repeats` turns. Layouts are those
that `execution.context_layout=auto` takes where documents do not call for another: contiguous under a window, else zigzag.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, get_args

import jax
import numpy as np
import tables
from context_parallel import DEVICES, HEAD_DIM, HEADS, in_turns, ours

from lcx.attention.parallel.ring import window_hops
from lcx.attention.spec import Strategy
from lcx.core.batch import SequenceLayout
from lcx.core.host import take_huge_pages
from lcx.core.mask import Mask
from lcx.report import markdown

TOKENS, KV_HEADS = (256, 1024, 2048), (1, 8)
WINDOW, DOCUMENTS = 512, 24
MASKS = ("causal", "window", "documents")


def cell(tokens: int, kv_heads: int, mask: str, repeats: int) -> dict[str, Any]:
    """Seconds of every strategy that serves rows of `tokens` on each device."""
    length, rng = DEVICES * tokens, np.random.default_rng(0)
    buffers = [rng.standard_normal((1, length, heads, HEAD_DIM), np.float32) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    seen = Mask(window=WINDOW) if mask == "window" else Mask()
    layout: SequenceLayout = "contiguous" if mask == "window" else "zigzag"
    segments = None
    if mask == "documents":
        ends = np.sort(rng.choice(length, DOCUMENTS - 1, replace=False))
        segments = (1 + np.searchsorted(ends, np.arange(length), side="right"))[None].astype(np.int32)
    near = mask == "window" and window_hops(seen, layout, tokens, DEVICES) is not None
    wanted = [name for name in get_args(Strategy) if name != "nested" and (name != "window" or near)]
    runs = {name: ours((name, layout, 1), buffers, seen, segments)[0] for name in wanted}
    for run in runs.values():
        run()
    return {"tokens": tokens, "kv_heads": kv_heads, "mask": mask, "layout": layout, "seconds": in_turns(runs, repeats)}


def main() -> None:
    """Measures, prints the table, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens on each device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "strategies.json")
    arguments = parser.parse_args()
    take_huge_pages()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    cells = []
    for tokens in arguments.tokens:
        for kv_heads in KV_HEADS:
            for mask in MASKS:
                cells.append(cell(tokens, kv_heads, mask, arguments.repeats))
                print(f"{tokens:,} tokens, {kv_heads} KV heads, {mask}: done", flush=True)
    found = {"jax": jax.__version__, "devices": DEVICES, "heads": HEADS, "window": WINDOW, "documents": DOCUMENTS, "cells": cells}
    print(markdown.table(*tables.strategies(found)))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"figures in {arguments.out}")


if __name__ == "__main__":
    main()
