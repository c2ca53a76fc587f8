"""Tokens/s and peak memory of a training step: lcx against transformers + torch, for one Llama-shaped model on the CPU.

    python benchmarks/train_step.py                                 torch and transformers beside lcx (`make bench`)
    python benchmarks/train_step.py --peer_python=PATH/bin/python   ... or in another environment

A step is forward, backward, clipping and AdamW in float32 on all cores. At each length both sides live at once, each in its own
process, and take turns (A B A B ...), each after a step that is not timed; a figure is the median over the turns, the ratio that
over the pairs of turns. Peak memory is the most that a process held, less what it held after its imports: compilation, weights and
optimizer state are in it.
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

from absl import app, flags
from process import Process
from rich.console import Console
from rich.table import Table
from sides.side import MODEL, cores

HERE = Path(__file__).resolve().parent
CASES = {512: 8, 4096: 1, 16384: 1}
"""Rows of a step at each length."""
WANTED = {512: (1.5, None), 4096: (1.5, None), 16384: (1.0, 0.5)}
"""At each length the least ratio of tokens/s and the greatest ratio of memory, lcx to torch."""
SIDES = ("lcx", "torch")

FLAGS = flags.FLAGS
flags.DEFINE_string("peer_python", sys.executable, "Interpreter that has torch and transformers.")
flags.DEFINE_string("out", str(HERE / "results" / "train_step.json"), "Where the figures are written.")
flags.DEFINE_multi_integer("length", list(CASES), "Lengths to measure.")
flags.DEFINE_integer("pairs", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_float("turn_seconds", 5.0, "How long a turn lasts, about.")
flags.DEFINE_float("max_load", 1.0, "Wait until the machine's load is below this.")
flags.DEFINE_float("wait", 120.0, "Seconds to wait for that at most; what was found is written down.")


class Side(Process):
    """One side's process for one case."""

    def __init__(self, name: str, python: str, case: dict[str, int]):
        self.tokens = case["rows"] * case["length"]
        # The peer's interpreter must not see packages of this one.
        super().__init__(name, f"{name}_side", case, python, own_packages=name != "torch")

    def turn(self, steps: int) -> float:
        """Tokens per second over some steps."""
        return steps * self.tokens / self.ask(str(steps))["seconds"]


def measure(length: int) -> dict[str, Any]:
    """Figures of both sides at one length."""
    case = {"rows": CASES.get(length, 1), "length": length}
    pythons = {"lcx": sys.executable, "torch": FLAGS.peer_python}
    sides = {name: Side(name, pythons[name], case) for name in SIDES}
    if len({side.facts["parameters"] for side in sides.values()}) > 1:
        sys.exit(f"the models differ: {[(name, side.facts['parameters']) for name, side in sides.items()]} parameters")
    load = quiet()
    steps = {name: max(1, round(FLAGS.turn_seconds * side.turn(1) / side.tokens)) for name, side in sides.items()}
    turns: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(FLAGS.pairs):
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
        "speed_ratio": statistics.median(a / b for a, b in zip(turns["lcx"], turns["torch"], strict=True)),
        "peak_bytes": {name: memory[name]["peak_bytes"] for name in SIDES},
        "after_imports_bytes": {name: memory[name]["baseline_bytes"] for name in SIDES},
        "memory_ratio": memory["lcx"]["peak_bytes"] / memory["torch"]["peak_bytes"],
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


def verdict(result: dict[str, Any]) -> str:
    """Whether a case reaches what is asked of it."""
    least, most = WANTED.get(result["length"], (None, None))
    short = []
    if least is not None and result["speed_ratio"] < least:
        short.append(f"below {least}x the speed")
    if most is not None and result["memory_ratio"] > most:
        short.append(f"above {most}x the memory")
    return ", ".join(short) or "reached"


def show(results: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    table = Table(title="Training step, lcx against transformers + torch", title_justify="left")
    for column in ("tokens", "rows", "lcx tok/s", "torch tok/s", "ratio", "lcx MiB", "torch MiB", "ratio", "asked for"):
        table.add_column(column, justify="right")
    for result in results:
        speed, peak = result["tokens_per_second"], {name: result["peak_bytes"][name] / 2**20 for name in SIDES}
        cells = [
            f"{result['length']:,}",
            result["rows"],
            *(f"{speed[name]:,.0f}" for name in SIDES),
            f"{result['speed_ratio']:.2f}x",
        ]
        cells += [*(f"{peak[name]:,.0f}" for name in SIDES), f"{result['memory_ratio']:.2f}x", verdict(result)]
        table.add_row(*map(str, cells))
    Console().print(table)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


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
