"""Generation: tokens/s of decoding and prefill, lcx against transformers, and the memory of a 65,536-token prompt.

    python benchmarks/generation.py                  torch and transformers beside lcx (`make bench`)
    python benchmarks/generation.py --nolong         ... without the long prompt, which takes minutes

One Llama of 58 million random float32 weights on both sides, greedy, on all cores; each side is a process of its own, and they take
turns (A B A B ...). A turn is one generation: up to the first token it is prefill, then decoding. Ratios are medians over the pairs
of turns, of seconds on the clock and of processor seconds of all threads. Both sides have to give the same tokens. Beside other
work torch's threads wait for each other by spinning, which no figure makes up for: measure on a quiet machine, or, roughly, with
OMP_WAIT_POLICY=PASSIVE. The long prompt is lcx alone, a model of two layers.
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

HERE = Path(__file__).resolve().parent
SIDES = {"lcx": "decode_lcx", "torch": "decode_torch"}

FLAGS = flags.FLAGS
flags.DEFINE_string("out", str(HERE / "results" / "generation.json"), "Where the figures are written.")
flags.DEFINE_multi_integer("rows", [1, 8], "Batch sizes to measure.")
flags.DEFINE_integer("length", 512, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("new", 128, "Tokens that are generated.", lower_bound=2)
flags.DEFINE_integer("pairs", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_bool("long", True, "Also prefill a long prompt.")
flags.DEFINE_integer("long_length", 65536, "Tokens of the long prompt.", lower_bound=1)
flags.DEFINE_integer("long_chunk", 2048, "Tokens of it that are prefilled at a time.", lower_bound=1)


def measure(rows: int) -> dict[str, Any]:
    """Figures of both sides for a batch."""
    case = {"rows": rows, "length": FLAGS.length, "new": FLAGS.new}
    sides = {name: Process(name, script, case) for name, script in SIDES.items()}
    facts = {name: side.facts for name, side in sides.items()}
    same = facts["lcx"]["tokens"] == facts["torch"]["tokens"]
    if facts["lcx"]["parameters"] != facts["torch"]["parameters"] or not same:
        sys.exit(f"the sides differ: {[fact['parameters'] for fact in facts.values()]} parameters, tokens equal: {same}")
    load, turns = os.getloadavg()[0], {name: [] for name in SIDES}
    for _ in range(FLAGS.pairs):
        for name, side in sides.items():
            turns[name].append(side.ask())
    memory = {name: side.finish()["peak_bytes"] for name, side in sides.items()}
    result = {**case, "load_before": load, "same_tokens": same, "turns": turns, "peak_bytes": memory}
    for what, tokens in (("prefill", rows * FLAGS.length), ("decode", rows * (FLAGS.new - 1))):
        for clock, suffix in (("wall", ""), ("cpu", "_cpu")):
            seconds = {name: [turn[f"{what}{suffix}"] for turn in found] for name, found in turns.items()}
            result[f"{what}_{clock}"] = {
                **{name: tokens / statistics.median(values) for name, values in seconds.items()},
                "ratio": statistics.median(b / a for a, b in zip(seconds["lcx"], seconds["torch"], strict=True)),
            }
    versions = {key: value for fact in facts.values() for key, value in fact["versions"].items()}
    return {**result, "versions": versions}


def long_prompt() -> dict[str, Any]:
    """Prefill of a long prompt in lcx: seconds, and what its program holds beside weights and cache."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lcx.core.batch import Index
    from lcx.core.param_spec import initialize
    from lcx.model.architecture import build_architecture
    from lcx.model.cache import empty_cache
    from lcx.model.config import ModelConfig
    from lcx.model.decode import _extend, generate
    from lcx.model.execution import ExecutionConfig
    from lcx.model.params import specs
    from lcx.model.transformer import unstack
    from lcx.positions.rotary import Rope

    sizes = dict(vocab_size=256, model_dim=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=384)
    length, chunk, new = FLAGS.long_length, FLAGS.long_chunk, 8
    config, schemes = ModelConfig(**sizes), {"global": Rope(theta=5e6)}
    arch, buffers = build_architecture(config, ExecutionConfig(), schemes, length + new)
    params = initialize(specs(config, schemes, length + new), jax.random.key(0))
    cache = empty_cache(arch, buffers, 1, length + new, chunk, stacked=False)
    part = jnp.zeros((1, chunk), jnp.int32)
    lowered = _extend.lower(jax.jit(unstack)(params), buffers, arch, cache, part, Index(part, part, part + 1), jnp.int32(0), 0)
    memory, found = lowered.compile().memory_analysis(), []
    generate(params, buffers, arch, [np.arange(length) % 256], new, chunk=chunk, report=found.append)
    return {
        "model": sizes, "length": length, "chunk": chunk, "temporary_bytes": memory.temp_size_in_bytes,
        "cache_bytes": sum(x.nbytes for x in jax.tree.leaves(cache)),
        "chunk_by_keys_bytes": 4 * sizes["num_heads"] * chunk * length,
        "all_by_all_bytes": 4 * sizes["num_heads"] * length * length,
        "prefill_seconds": found[0].prefill_seconds, "prefill_tokens_per_second": found[0].prefill_rate,
        "decode_tokens_per_second": found[0].decode_rate,
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Measure, show, write."""
    if len(argv) > 1:
        sys.exit(f"unknown arguments {argv[1:]}; see --help")
    record: dict[str, Any] = {"machine": {"cores": len(os.sched_getaffinity(0)), "system": platform.system()}, "results": []}
    out = Path(FLAGS.out)
    for rows in FLAGS.rows:
        result = measure(rows)
        record["machine"]["versions"] = result.pop("versions")
        record["results"].append(result)
        for what in ("decode_wall", "decode_cpu", "prefill_wall", "prefill_cpu"):
            speed = result[what]
            print(f"{rows} rows, {what}: lcx {speed['lcx']:,.1f}, torch {speed['torch']:,.1f} tokens/s, ratio {speed['ratio']:.2f}")
        out.write_text(json.dumps(record, indent=1) + "\n")
    if FLAGS.long:
        start = time.perf_counter()
        record["long"] = long_prompt()
        print(json.dumps(record["long"]), f"in {time.perf_counter() - start:,.0f} s")
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
