"""Merging two bfloat16 folders of Llama 3 8B's shapes: lcx against reading and writing the files once, and against mergekit.

    python -m venv /tmp/peer-merge && /tmp/peer-merge/bin/pip install mergekit
    python benchmarks/merging.py --folder=/tmp/merging --peer_python=/tmp/peer-merge/bin/python
    python benchmarks/merging.py --folder=/tmp/merging --layers=4 --peer_python=/tmp/peer-merge/bin/python

Writes a random base and a fine-tune of it into the folder, unless it holds them already, and leaves them there: 48 GB on the disk
with what is written, 12 GB with 4 layers. `linear` takes both models as they are, `task_arithmetic` and `ties` (density 0.5) the
second relative to the first. Each merge is a process of its own, and the sides take turns; before each, what the system's cache
holds of the inputs is dropped. "files" reads the two folders once and writes the bytes of one, with one buffer. Seconds are those
from the call until everything is on the disk, without the start of Python and its imports. Memory is the process's high-water mark
less what it held after its imports; pages of mapped files count.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tables
from absl import app, flags

HERE = Path(__file__).resolve().parent

SIZES = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
)  # fmt: skip

METHODS = ("linear", "task_arithmetic", "ties")

FLAGS = flags.FLAGS
flags.DEFINE_string("folder", None, "Where the models are, or are written.", required=True)
flags.DEFINE_integer("layers", 32, "Layers of the models.", lower_bound=1)
flags.DEFINE_integer("turns", 2, "Turns of each side.", lower_bound=1)
flags.DEFINE_multi_enum("methods", METHODS, METHODS, "What is merged by.")
flags.DEFINE_string("peer_python", None, "The interpreter that mergekit is installed for (None: without it).")
flags.DEFINE_multi_enum("peer_methods", METHODS[:2], METHODS, "What mergekit merges by; its ties take minutes a billion numbers.")
flags.DEFINE_string("out", str(HERE / "results" / "merging.json"), "Where the figures are written.")


def write(root: Path, layers: int) -> None:
    """A base of normal numbers, and a fine-tune near it; numbers repeat after 16 million, at another place in each tensor."""
    import ml_dtypes

    from lcx.interop import hf_config, weights
    from lcx.merging.writer import Stored, Writer
    from lcx.model.params import specs

    values = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    values["torch_dtype"] = "bfloat16"
    described = hf_config.read(values)
    slots = weights.slots(specs(described.model, described.schemes, 8192), described.family, layers)
    stored = {name: Stored(parts[0].tensor_shape, "bfloat16") for name, parts in slots.items()}
    rng = np.random.default_rng(0)
    start, moved = (rng.standard_normal(1 << 24).astype(np.float32) * scale for scale in (0.02, 0.001))
    for folder, change in ((root / "base", 0), (root / "tuned", moved)):
        folder.mkdir(parents=True)
        pool = (start + change).astype(ml_dtypes.bfloat16)
        writer = Writer(folder, stored, 5 * 10**9)
        for i, (name, of) in enumerate(stored.items()):
            writer.begin(name)
            rows, columns = (1, of.shape[0]) if len(of.shape) == 1 else of.shape
            for first in range(0, rows, step := 1 << 10):
                count = min(step, rows - first) * columns
                writer.write(name, first, np.resize(np.roll(pool, -(first + i) * 4099), count).reshape(-1, columns))
            writer.finish(name)
        writer.close()
        (folder / "config.json").write_text(json.dumps(values))


def yaml_of(method: str, root: Path) -> dict[str, Any]:
    """A merge of both folders."""
    parameters = {"weight": 0.5, "density": 0.5} if method == "ties" else {"weight": 0.5}
    models = [{"model": str(root / name), "parameters": parameters} for name in ("base", "tuned")]
    if method == "linear":
        return {"merge_method": method, "models": models, "dtype": "bfloat16"}
    return {"merge_method": method, "base_model": str(root / "base"), "models": models[1:], "dtype": "bfloat16"}


def turn(side: str, method: str, root: Path) -> dict[str, float]:
    """One merge by one side: seconds, and bytes of memory."""
    for path in root.glob("*/*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    case = {"side": side, "yaml": yaml_of(method, root), "folder": str(root), "out": str(out)}
    python = FLAGS.peer_python if side == "mergekit" else sys.executable
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or side != "mergekit"}
    command = [python, str(HERE / "sides" / "merge_side.py"), json.dumps(case)]
    answer = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(out, ignore_errors=True)
    return json.loads(answer.splitlines()[-1])


def main(_: list[str]) -> None:
    """Write what is missing, merge in turns, print and keep the table."""
    root = Path(FLAGS.folder)
    if not (root / "tuned" / "config.json").exists():
        write(root, FLAGS.layers)
    load = os.getloadavg()[0]
    turns: dict[str, dict[str, list[dict[str, float]]]] = {
        method: {side: [] for side in ("files", "lcx", "mergekit") if side != "mergekit" or _with_peer(method)}
        for method in FLAGS.methods
    }
    for _ in range(FLAGS.turns):
        for method, of_sides in turns.items():
            for side, kept in of_sides.items():
                kept.append(turn(side, method, root))
    size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_before": load}
    found = {"layers": FLAGS.layers, "bytes": size, "machine": machine, "summary": summary(turns), "turns": turns}
    print(tables.merging(found))
    Path(FLAGS.out).write_text(json.dumps(found, indent=1) + "\n")
    tables.main()


def _with_peer(method: str) -> bool:
    return FLAGS.peer_python is not None and method in FLAGS.peer_methods


def summary(turns: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of the seconds and of the ratios to "files" of the same round; the most memory."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method, of_sides in turns.items():
        found[method] = {}
        for side, kept in of_sides.items():
            pairs = zip(kept, of_sides["files"], strict=True)
            found[method][side] = {
                "seconds": statistics.median(one["seconds"] for one in kept),
                "ratio": statistics.median(one["seconds"] / files["seconds"] for one, files in pairs),
                "processor_seconds": statistics.median(one["processor_seconds"] for one in kept),
                "bytes": max(one["bytes"] for one in kept),
            }
    return found


if __name__ == "__main__":
    app.run(main)
