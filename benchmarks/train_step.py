"""Tokens/s and peak memory of a training step: lcx against transformers + torch, for one Llama-shaped model on the CPU.

    python benchmarks/train_step.py                                 torch and transformers beside lcx (`make bench`)
    python benchmarks/train_step.py --peer_python=PATH/bin/python   ... or in another environment

A step is forward, backward, clipping and AdamW in float32 on all cores. lcx is there twice: as `lcx run` computes by itself, with a
device for each core that can share the heads, and on one device (`--host_devices=1`). At each length the sides live at once, each
in its own process, and take turns (A B C A B C ...), each after a step that is not timed; a figure is the median over the turns,
the ratio that over the rounds of turns. Peak memory is the most that a process held, less what it held after its imports:
compilation, weights and optimizer state are in it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import tables
from absl import app, flags
from process import Process, processor
from rich.console import Console
from rich.table import Table
from sides.side import MODEL, cores

from lcx.core import host
from lcx.core.host_devices import most_sharing

HERE = Path(__file__).resolve().parent
CASES = {512: 8, 4096: 1, 16384: 1}
"""Rows of a step at each length."""
WANTED = {512: (1.15, 1.1), 4096: (1.15, 1.1), 16384: (1.15, 0.6)}
"""At each length the least ratio of tokens/s and the greatest ratio of memory, lcx to torch."""
SHARING = most_sharing(host.cores(), (MODEL["num_heads"], MODEL["num_kv_heads"], *CASES))
SIDES = {
    "lcx": ("lcx_side", {"devices": SHARING}),
    "lcx, 1 device": ("lcx_side", {"devices": 1}),
    "torch": ("torch_side", {}),
}
"""Name -> its script, and what it is told beside the case."""
OURS = [name for name in SIDES if name != "torch"]

FLAGS = flags.FLAGS
flags.DEFINE_string("peer_python", sys.executable, "Interpreter that has torch and transformers.")
flags.DEFINE_string("out", str(HERE / "results" / "train_step.json"), "Where the figures are written.")
flags.DEFINE_multi_integer("length", list(CASES), "Lengths to measure.")
flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_float("turn_seconds", 5.0, "How long a turn lasts, about.")
flags.DEFINE_float("max_load", 1.0, "Wait until the machine's load is below this.")
flags.DEFINE_float("wait", 120.0, "Seconds to wait for that at most; what was found is written down.")


class Side(Process):
    """One side's process for one case."""

    def __init__(self, name: str, case: dict[str, int]):
        self.tokens = case["rows"] * case["length"]
        script, more = SIDES[name]
        # The peer's interpreter must not see packages of this one.
        own = name in OURS
        super().__init__(name, script, {**case, **more}, sys.executable if own else FLAGS.peer_python, own_packages=own)

    def turn(self, steps: int) -> float:
        """Tokens per second over some steps."""
        return steps * self.tokens / self.ask(str(steps))["seconds"]


def measure(length: int) -> dict[str, Any]:
    """Figures of all sides at one length."""
    case = {"rows": CASES.get(length, 1), "length": length}
    sides = {name: Side(name, case) for name in SIDES}
    if len({side.facts["parameters"] for side in sides.values()}) > 1:
        sys.exit(f"the models differ: {[(name, side.facts['parameters']) for name, side in sides.items()]} parameters")
    load = quiet()
    steps = {name: max(1, round(FLAGS.turn_seconds * side.turn(1) / side.tokens)) for name, side in sides.items()}
    turns: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(FLAGS.rounds):
        for name, side in sides.items():
            turns[name].append(side.turn(steps[name]))
    memory = {name: side.finish() for name, side in sides.items()}
    speed = {name: statistics.median(values) for name, values in turns.items()}
    return {
        **case,
        "load_before": load,
        "steps_per_turn": steps,
        "turns_tokens_per_second": turns,
        "tokens_per_second": speed,
        "speed_ratio": {name: statistics.median(a / b for a, b in zip(turns[name], turns["torch"], strict=True)) for name in OURS},
        "peak_bytes": {name: memory[name]["peak_bytes"] for name in SIDES},
        "after_imports_bytes": {name: memory[name]["baseline_bytes"] for name in SIDES},
        "memory_ratio": {name: memory[name]["peak_bytes"] / memory["torch"]["peak_bytes"] for name in OURS},
        "first_losses": {name: side.facts["losses"] for name, side in sides.items()},
        "start_seconds": {name: side.facts["start_seconds"] for name, side in sides.items()},
        "versions": {key: value for side in sides.values() for key, value in side.facts["versions"].items()},
    }


def quiet() -> float:
    """Wait for a quiet machine, within the limits of the flags; its one-minute load."""
    deadline = time.monotonic() + FLAGS.wait
    while (load := os.getloadavg()[0]) > FLAGS.max_load and time.monotonic() < deadline:
        time.sleep(5)
    return load


def verdict(result: dict[str, Any], side: str) -> str:
    """Whether a side of ours reaches what is asked of a case."""
    least, most = WANTED.get(result["length"], (None, None))
    short = []
    if least is not None and result["speed_ratio"][side] < least:
        short.append(f"below {least}x the speed")
    if most is not None and result["memory_ratio"][side] > most:
        short.append(f"above {most}x the memory")
    return ", ".join(short) or "reached"


def show(results: list[dict[str, Any]]) -> None:
    """The figures as the table that `tables` puts into the README, and whether they reach what is asked."""
    table = Table(title="Training step, lcx against transformers + torch", title_justify="left")
    for column in (*tables.STEPS_HEADER, "asked for"):
        table.add_column(column, justify="right")
    for result in results:
        for side, cells in tables.steps(result).items():
            table.add_row(*cells, verdict(result, side) if side in OURS else "")
    Console().print(table)


def main(argv: list[str]) -> None:
    """Measure, show, write."""
    if len(argv) > 1:
        sys.exit(f"unknown arguments {argv[1:]}; see --help")
    machine = {"processor": processor(), "cores": cores(), "system": platform.system(), "python": platform.python_version()}
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for length in FLAGS.length:
        results.append(measure(length))
        machine["versions"] = results[-1].pop("versions")
        record = {"machine": machine, "model": MODEL, "dtype": "float32", "results": results}
        out.write_text(json.dumps(record, indent=1) + "\n")
        show(results)
    print(f"written to {os.path.relpath(out)}")


if __name__ == "__main__":
    app.run(main)
