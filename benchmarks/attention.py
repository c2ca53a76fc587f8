"""Time of attention, forward and backward: causal against full, sliding window, torch's fused CPU kernel and tokamax if installed.

Run it as `python benchmarks/attention.py`. Kernels take turns and the best of `--repeats` counts, so that other load on the machine
hurts all alike. The wall clock and the processor time of all threads are given, in seconds. tokamax pins a typeguard that other
packages can't have, so it is in no extra: `pip install --no-deps tokamax qwix einshape immutabledict` puts it beside lcx.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.plan import choose_kernel
from lcx.attention.spec import AttentionSpec
from lcx.attention.tiles import visited_pairs
from lcx.core.batch import Index
from lcx.core.mask import Mask
from lcx.positions.scheme import SchemeSpec

SHAPES = ((8, 256, 4, 32), (8, 512, 8, 32), (1, 4096, 8, 32), (1, 8192, 8, 64), (1, 16384, 8, 32))
"""Batch, tokens, heads, head dim."""
TOKAMAX_LIMIT = 8192
"""Longest rows that tokamax is measured on: on a CPU it takes minutes beyond."""
MASKS = {"causal": Mask(), "full": Mask(causal=False), "window64": Mask(window=64)}


def ours(mask: Mask, shape: tuple[int, ...], buffers: list[np.ndarray]) -> Callable[[], object]:
    """A closure that runs forward and backward once."""
    index = Index.dense(*shape[:2])
    spec = AttentionSpec(mask, SchemeSpec(), scale=shape[-1] ** -0.5)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, index: Index) -> tuple[jax.Array, ...]:
        return jax.vjp(lambda q, k, v: attend(spec, q, k, v, index, index, q_tables={}, k_tables={}), q, k, v)[1](do)

    return compiled(step, *map(jnp.asarray, buffers), index)


def compiled(step: Callable[..., Any], *inputs: Any) -> Callable[[], object]:
    """A closure that runs the compiled step and waits for it."""
    run = jax.jit(step).lower(*inputs).compile()
    return lambda: jax.block_until_ready(run(*inputs))


def fused(shape: tuple[int, ...], buffers: list[np.ndarray]) -> Callable[[], object]:
    """The same with torch's scaled_dot_product_attention, causal."""
    import torch

    q, k, v, do = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in buffers)
    for x in (q, k, v):
        x.requires_grad_(True)

    def step() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(do)

    return step


def tokamax(shape: tuple[int, ...], buffers: list[np.ndarray]) -> Callable[[], object]:
    """The same with tokamax's attention in chunks, its one path on a CPU that holds no array of all pairs; causal."""
    import tokamax as peer
    from absl import flags

    flags.FLAGS(sys.argv[:1])  # tokamax would take this script's flags for its own

    def step(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        attend = functools.partial(peer.dot_product_attention, is_causal=True, implementation="xla_chunked")
        return jax.vjp(attend, q, k, v)[1](do)

    return compiled(step, *map(jnp.asarray, buffers))


def measure(steps: dict[Hashable, Callable[[], object]], repeats: int) -> dict[Hashable, dict[str, float]]:
    """Best wall and processor seconds of each step; the steps take turns."""
    best = {name: {"wall": float("inf"), "cpu": float("inf")} for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = {"wall": min(best[name]["wall"], wall), "cpu": min(best[name]["cpu"], cpu)}
    return best


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "attention.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=16384, help="leave out shapes with more tokens")
    arguments = parser.parse_args()
    rows = []
    for shape in (shape for shape in SHAPES if shape[1] <= arguments.longest):
        B, T, N, _ = shape
        buffers = list(np.random.default_rng(0).standard_normal((4, *shape), np.float32))
        steps = {name: ours(mask, shape, buffers) for name, mask in MASKS.items()}
        if importlib.util.find_spec("torch"):
            steps["torch causal"] = fused(shape, buffers)
        if importlib.util.find_spec("tokamax") and T <= TOKAMAX_LIMIT:
            steps["tokamax causal"] = tokamax(shape, buffers)
        sizes = {"batch": B, "heads": N, "kv_heads": N, "head_dim": shape[3], "dtype": buffers[0].dtype}
        plan = choose_kernel(AttentionSpec(Mask(), SchemeSpec(), scale=1.0), T, T, jax.default_backend(), **sizes)
        row = {"shape": shape, "plan": plan.reason, "seconds": measure(steps, arguments.repeats)}
        if plan.blocks is not None:
            visited, total = visited_pairs(Mask(), Index.dense(1, T), Index.dense(1, T), plan.blocks.q, plan.blocks.k)
            row["causal block pairs"] = int(visited) / total
        rows.append(row)
        print(json.dumps(row))
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
