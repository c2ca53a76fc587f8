"""What checksums cost: a checkpoint of Llama 3 8B's shapes saved and loaded with them and without, in turns, in one process.

    python benchmarks/checksums.py --folder=/tmp/checkpoints                   one layer, float32, 0.87 GB
    python benchmarks/checksums.py --folder=/tmp/checkpoints --layers=4        ... four

Numbers are random, so that nothing is compressed. A save counts until the checkpoint is complete on the disk, a load until all
arrays are there and compared. Cost is per byte, so that fewer layers say what 32 would. "processor" counts the seconds of all
threads.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import tables
from process import processor

from lcx.core.checksums import own_sums
from lcx.core.param_spec import is_spec
from lcx.core.trees import num_bytes
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.params import specs
from lcx.positions.registry import from_config
from lcx.training.checkpoints import Store
from lcx.training.meta import Meta
from lcx.training.stages import CheckpointConfig

SIZES = {"vocab_size": 256, "model_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 14336}
SIDES = {"without": False, "with": True}


def params(layers: int) -> Any:
    """Random float32 parameters of so many layers, without embeddings."""
    model = ModelConfig(**SIZES, num_layers=layers)
    schemes = build_schemes(model, {"default": from_config({"name": "rope", "theta": 5e5})})
    found, structure = jax.tree.flatten(specs(model, schemes, 8192)["layers"], is_leaf=is_spec)
    keys = jax.random.split(jax.random.key(0), len(found))
    return jax.tree.unflatten(structure, [jax.random.normal(key, one.shape) for key, one in zip(keys, found, strict=True)])


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds on the clock, and of all threads."""
    wall, own = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - own}


def turn(folder: pathlib.Path, tree: Any, with_checksums: bool, step: int) -> dict[str, dict[str, float]]:
    """One save and one load."""
    meta = Meta("only", 0, 0, step, step, 8192, 0, "", {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    with Store(folder, CheckpointConfig(keep_latest=1), with_checksums=with_checksums) as store:

        def save() -> None:
            store.save_params(tree, meta)
            store.wait()

        os.sync()
        saved = timed(save)
        loaded = timed(lambda: jax.block_until_ready(store.read_params(step, lambda _: like)))
    shutil.rmtree(folder)
    return {"save": saved, "load": loaded}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of every side, and of the ratios within a round."""
    found: dict[str, Any] = {}
    for what in ("save", "load"):
        for clock in ("wall", "processor"):
            each = {side: [one[side][what][clock] for one in rounds] for side in SIDES}
            ratios = [with_ / without for without, with_ in zip(each["without"], each["with"], strict=True)]
            found[f"{what}, {clock}"] = {
                **{side: statistics.median(x) for side, x in each.items()},
                "ratio": statistics.median(ratios),
            }
    return found


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=tables.HERE / "results" / "checksums.json")
    args = parser.parse_args()
    tree = params(args.layers)
    before = os.getloadavg()[0]
    alone = [timed(lambda: own_sums(tree)) for _ in range(3)]
    rounds = []
    for number in range(args.rounds + 1):
        order = list(SIDES) if number % 2 else list(SIDES)[::-1]
        found = {side: turn(args.folder / "run", tree, SIDES[side], number) for side in order}
        if number:  # the first round is for what is done once in a process
            rounds.append(found)
            print(json.dumps(found), flush=True)
    content = {
        "layers": args.layers,
        "bytes": num_bytes(tree),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_before": before, "load_after": os.getloadavg()[0]},
        "summary": summary(rounds),
        "checksums_alone": {clock: min(one[clock] for one in alone) for clock in ("wall", "processor")},
        "rounds": rounds,
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(tables.checksums(content))


if __name__ == "__main__":
    main()
