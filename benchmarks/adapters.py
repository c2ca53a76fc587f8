"""Tokens/s and peak memory of a step on a SmolLM2-135M, in full and by adapters: lcx against transformers and against peft.

    python benchmarks/adapters.py [--length=2048 --length=8192] [--dtype=bfloat16] [--peer_python=PATH/bin/python]

Random weights in the sizes of SmolLM2-135M, rank 8 on queries, keys, values and outputs, one row, on all cores: forward, backward,
clipping, AdamW. With bfloat16 all sides hold float32 weights and compute in bfloat16, the peers by torch's autocast. The peers
recompute their layers (gradient checkpointing) above 2,048 tokens, where they do not fit otherwise. The sides live at once, each
in its own process, and take turns; a figure is the median over the turns. Peak memory is the most that a process held, less what
it held after its imports. What the file of results holds of other lengths, processors, types and sides is kept.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import tables
from absl import app, flags
from process import Process, processor
from sides.side import cores

HERE = Path(__file__).resolve().parent
SIZES = dict(vocab_size=49152, model_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, mlp_dim=1536)
THETA, RANK, ALPHA = 100000.0, 8, 16.0
CASE = {"sizes": SIZES, "theta": THETA, "alpha": ALPHA}
OURS = {"remat": "auto", "base_dtype": "float32"}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "lcx, full": ("adapters_lcx", {"rank": None, **OURS}),
    "lcx, LoRA": ("adapters_lcx", {"rank": RANK, **OURS}),
    "transformers, full": ("adapters_peft", {"rank": None}),
    "peft, LoRA": ("adapters_peft", {"rank": RANK}),
}
UNCHECKPOINTED = 2048
"""Tokens up to which the peers keep their activations."""

FLAGS = flags.FLAGS
flags.DEFINE_string("peer_python", sys.executable, "Interpreter that has torch, transformers and peft.")
flags.DEFINE_string("out", str(HERE / "results" / "adapters.json"), "Where the figures are written.")
flags.DEFINE_multi_integer("length", [2048, 8192], "Lengths to measure.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type in which all sides compute.")
flags.DEFINE_integer("rounds", 2, "Turns of each side, of one step.", lower_bound=1)
flags.DEFINE_multi_enum("side", list(SIDES), list(SIDES), "Sides to measure.")


def measure(length: int) -> dict[str, Any]:
    """Figures of all sides at one length."""
    sides = {}
    for name in FLAGS.side:
        script, more = SIDES[name]
        own = script == "adapters_lcx"
        python = sys.executable if own else FLAGS.peer_python
        case = {**CASE, "length": length, "dtype": FLAGS.dtype, **more}
        case |= {} if own else {"checkpointing": length > UNCHECKPOINTED}
        sides[name] = Process(name, script, case, python, own_packages=own)
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(FLAGS.rounds):
        for name, side in sides.items():
            turns[name].append(length / side.ask("1")["seconds"])
    memory = {name: side.finish()["peak_bytes"] for name, side in sides.items()}
    speed = {name: statistics.median(values) for name, values in turns.items()}
    facts = {name: {key: side.facts[key] for key in ("parameters", "trained")} for name, side in sides.items()}
    versions = {key: value for side in sides.values() for key, value in side.facts["versions"].items()}
    return {
        "length": length, "dtype": FLAGS.dtype, "turns_tokens_per_second": turns, "tokens_per_second": speed,
        "peak_bytes": memory, "facts": facts, "versions": versions,
    }  # fmt: skip


def key(result: dict[str, Any]) -> tuple:
    """What was measured."""
    return result["length"], result["machine"]["processor"], result["dtype"], list(result["peak_bytes"])


def main(argv: list[str]) -> None:
    """Measure, write, show."""
    if len(argv) > 1:
        sys.exit(f"unknown arguments {argv[1:]}; see --help")
    out = Path(FLAGS.out)
    results = json.loads(out.read_text())["results"] if out.exists() else []
    for length in FLAGS.length:
        measured = measure(length)
        machine = {"processor": processor(), "cores": cores(), "system": platform.system(), "python": platform.python_version()}
        measured["machine"] = {**machine, "versions": measured.pop("versions")}
        others = [old for old in results if key(old) != key(measured)]
        results = sorted([measured, *others], key=key)
        found = {"sizes": SIZES, "rank": RANK, "results": results}
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(tables.adapters(found))
    if out.parent == HERE / "results":
        tables.main()
    print(f"written to {os.path.relpath(out)}")


if __name__ == "__main__":
    app.run(main)
