"""Reading a large Hugging Face checkpoint onto a mesh: time against reading its files once, and memory beside the weights.

    python benchmarks/import_hf.py --folder=/tmp/eight_b               8B parameters in bfloat16, 16 GB on disk, 8 host devices
    python benchmarks/import_hf.py --folder=/tmp/two_b --layers=6      ... a fifth of it

Writes random shards of Llama 3 8B's shapes into the folder, unless it holds them already, and leaves them there. Each reading is
a process of its own. "files" reads every byte of them into one buffer, "files, kept" into as much memory as they are large, which
the kernel has to give and clear; all find them in the page cache or not, in turns.
Memory is the process's high-water mark less what it held before.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import tables

from lcx.core.host import take_huge_pages

SHARD = 5 * 10**9
SIZES = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
)  # fmt: skip


def write(folder: pathlib.Path, layers: int) -> None:
    """Random bfloat16 weights, every number finite."""
    import ml_dtypes
    import numpy as np

    from lcx.interop import hf_config, shards, weights
    from lcx.model.params import specs

    values = {**SIZES, "model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    described = hf_config.read(values)
    slots = weights.slots(specs(described.model, described.schemes, 8192), described.family, layers)
    rng = np.random.default_rng(0)

    def tensor(name: str) -> np.ndarray:
        shape = slots[name][0].tensor_shape
        # Without an exponent's highest bit numbers are below 2 and finite.
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & 0xBFFF
        return bits.view(ml_dtypes.bfloat16).reshape(shape)

    sizes = {name: 2 * int(np.prod(parts[0].tensor_shape)) for name, parts in slots.items()}
    folder.mkdir(parents=True, exist_ok=True)
    shards.write(folder, sizes, tensor, SHARD)
    (folder / "config.json").write_text(json.dumps(values))


def high_water() -> int:
    """Bytes that this process held at most."""
    lines = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def read_files(folder: pathlib.Path, keep: bool = False) -> dict[str, float]:
    """Every byte once, into one buffer or into as much memory as the files are large."""
    start, total, kept, buffer = time.perf_counter(), 0, [], bytearray(1 << 24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
                if keep:
                    kept.append(bytes(buffer[:count]))
    return {"seconds": time.perf_counter() - start, "bytes": total}


def read_model(folder: pathlib.Path) -> dict[str, float]:
    """All weights onto 8 host devices."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax

    from lcx.core.mesh import MeshConfig, make_mesh
    from lcx.core.trees import num_bytes
    from lcx.interop.folder import HfFolder

    mesh = make_mesh(MeshConfig())
    before = high_water()
    start = time.perf_counter()
    params = jax.block_until_ready(HfFolder(folder).params(mesh=mesh))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": num_bytes(params), "beside": high_water() - before - num_bytes(params)}


SIDES = {"files": read_files, "files, kept": functools.partial(read_files, keep=True), "lcx": read_model}


def main() -> None:
    """Write what is missing, read in turns, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "import_hf.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    take_huge_pages()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.folder)))
        return
    if not (arguments.folder / "config.json").exists():
        write(arguments.folder, arguments.layers)
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeats):
        for side, found in rows.items():
            command = [sys.executable, __file__, f"--folder={arguments.folder}", f"--side={side}"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(out.splitlines()[-1]))
    best = {side: min(found, key=lambda row: row["seconds"]) for side, found in rows.items()}
    best["lcx"]["beside"] = max(row["beside"] for row in rows["lcx"])
    found = {"layers": arguments.layers, "best": best}
    print(tables.import_hf(found))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    tables.main()


if __name__ == "__main__":
    main()
