"""Attention over a split sequence, forward and backward: strategies and layouts of lcx against the package `ringattention`.

    python benchmarks/context_parallel.py                    8 host devices, 8,192 and 32,768 tokens, 8 heads of 64, causal
    python benchmarks/context_parallel.py --lengths=8192     ... one length

`ringattention` comes with `make bench`; without it lcx is measured alone. All programs take the same arrays on the same mesh in one
process, in turns; a figure is the best of `--repeats` turns. Memory is what XLA says a device's program needs beside arguments and
results. The error is the largest of o and dq against float64 over 64 queries, both divided by the largest value of the reference.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from lcx.attention.attend import attend
from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.attention.spec import AttentionSpec
from lcx.core.batch import Index
from lcx.core.host import take_huge_pages
from lcx.core.mask import Mask
from lcx.core.mesh import MeshConfig, make_mesh
from lcx.positions.scheme import SchemeSpec

DEVICES, HEADS, HEAD_DIM, QUERIES = 8, 8, 64, 64
WAYS = {
    "ring, zigzag": ("ring", "zigzag", 1),
    "ring, striped": ("ring", "striped", 1),
    "ring, contiguous": ("ring", "contiguous", 1),
    "gather, zigzag": ("gather", "zigzag", 1),
    "hybrid 4x2, zigzag": ("ring", "zigzag", 2),
    "ulysses": ("auto", "contiguous", 8),
}
"""Strategy, layout, devices of the ulysses axis."""
PEER_CHUNKS = (256, 512, 1024)
"""Chunk sizes that the peer is tried with; its fastest counts."""

Program = tuple[Callable[[], Any], int, Callable[[Any], tuple[np.ndarray, np.ndarray]]]
"""A run of forward and backward, its temporary bytes, and (o, dq) in row order of what it gave."""


def ours(
    way: tuple[str, str, int], buffers: list[np.ndarray], mask: Mask | None = None, segments: np.ndarray | None = None
) -> Program:
    """lcx over the mesh; `segments` int32 `[1, T]` are the documents' ids, without which the row is one document."""
    strategy, layout, ulysses = way
    ring, length = DEVICES // ulysses, buffers[0].shape[1]
    mesh = make_mesh(MeshConfig(fsdp=1, context=DEVICES, ulysses=ulysses))
    spec = AttentionSpec(mask or Mask(), SchemeSpec(), scale=HEAD_DIM**-0.5, strategy=strategy)
    index = Index.dense(1, length)
    index = index if segments is None else index.replace(segments=segments)
    index = arrange(index, layout, ring).replace(layout=layout)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, index: Index) -> tuple[jax.Array, ...]:
        o, pull = jax.vjp(lambda q, k, v: attend(spec, q, k, v, index, index, q_tables={}, k_tables={}), q, k, v)
        return (o, *pull(do))

    split = NamedSharding(mesh, PartitionSpec(None, ("ring", "ulysses")))
    inputs = [jax.device_put(arrange(x, layout, ring), split) for x in buffers]
    index = jax.device_put(index, split)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*inputs, index).compile()

    def results(out: tuple) -> tuple[np.ndarray, np.ndarray]:
        o, dq = (restore(np.asarray(x), layout, ring) for x in out[:2])
        return o, dq

    return lambda: jax.block_until_ready(compiled(*inputs, index)), compiled.memory_analysis().temp_size_in_bytes, results


def peer(chunk: int, buffers: list[np.ndarray]) -> Program:
    """`ringattention` over a ring of all devices."""
    ring_attention = peer_function()
    mesh = Mesh(np.array(jax.devices()), ("sp",))
    options = dict(
        causal_block_size=1, deterministic=True, dropout_rng=None, attn_pdrop=0.0, query_chunk_size=chunk, key_chunk_size=chunk,
        dtype=jnp.float32, policy=jax.checkpoint_policies.nothing_saveable, precision=None, prevent_cse=True,
    )  # fmt: skip
    length = buffers[0].shape[1]
    split = PartitionSpec(None, "sp")
    bias, segments = jnp.zeros((1, 1, 1, length)), jnp.zeros((1, length), jnp.int32)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return ring_attention(q, k, v, bias, segments, None, "sp", True, options)

        return jax.shard_map(one, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)(q, k, v)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        o, pull = jax.vjp(attention, q, k, v)
        return (o, *pull(do))

    inputs = [jax.device_put(x, NamedSharding(mesh, split)) for x in buffers]
    compiled = jax.jit(step).lower(*inputs).compile()
    run = lambda: jax.block_until_ready(compiled(*inputs))  # noqa: E731
    return run, compiled.memory_analysis().temp_size_in_bytes, lambda out: (np.asarray(out[0]), np.asarray(out[1]))


def peer_function() -> Callable[..., jax.Array]:
    """The peer's function; it asks for a module that JAX no longer has."""
    import jax.extend.backend

    shim = types.ModuleType("jax.lib.xla_bridge")
    shim.get_backend = jax.extend.backend.get_backend
    sys.modules["jax.lib.xla_bridge"] = jax.lib.xla_bridge = shim
    from ringattention import ring_attention

    return ring_attention


def exact(buffers: list[np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """o and dq of some rows in float64, `[N, rows, H]` each."""
    q, k, v, do = (x[0].astype(np.float64).swapaxes(0, 1) for x in buffers)
    q, do, scale = q[:, rows], do[:, rows], HEAD_DIM**-0.5
    logits = np.where(np.arange(k.shape[1]) <= rows[:, None], q @ k.swapaxes(1, 2) * scale, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = p @ v
    ds = p * (do @ v.swapaxes(1, 2) - np.sum(do * o, axis=-1, keepdims=True))
    return o, ds @ k * scale


def error(found: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> float:
    """The larger of both errors, relative to the largest value."""
    return max(
        float(np.abs(x[0, rows].swapaxes(0, 1) - want).max() / np.abs(want).max()) for x, want in zip(found, reference, strict=True)
    )


def measure(length: int, repeats: int, chosen: list[str]) -> list[dict[str, Any]]:
    """The ways whose names begin like one of `chosen`, at one length."""
    buffers = list(np.random.default_rng(0).standard_normal((4, 1, length, HEADS, HEAD_DIM), np.float32))
    rows = np.random.default_rng(1).choice(length, QUERIES, replace=False)
    reference = exact(buffers, rows)
    makers = {name: functools.partial(ours, way) for name, way in WAYS.items()}
    if importlib.util.find_spec("ringattention"):
        makers |= {f"ringattention, chunks of {chunk:,}": functools.partial(peer, chunk) for chunk in PEER_CHUNKS}
    programs = {name: make(buffers) for name, make in makers.items() if name.startswith(tuple(chosen))}
    found = {
        name: {
            "length": length,
            "way": name,
            "temporary_bytes": memory,
            "error": error(results(run()), reference, rows),
        }
        for name, (run, memory, results) in programs.items()
    }
    seconds = in_turns({name: run for name, (run, _, _) in programs.items()}, repeats)
    return [{**row, "seconds": seconds[name]} for name, row in found.items()]


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of runs that take turns, so many of each; what a first run does once should be done before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(rows: list[dict[str, Any]]) -> None:
    """The table that `tables` puts into the README."""
    table = Table(title=f"{HEADS} heads of {HEAD_DIM}, causal, forward and backward, {DEVICES} host devices")
    for column in tables.WAYS_HEADER:
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in tables.ways(rows):
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Measures, prints the table, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=[*WAYS, "ringattention"], help="beginnings of the names of what to measure")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "context_parallel.json")
    arguments = parser.parse_args()
    take_huge_pages()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = [row for length in arguments.lengths for row in measure(length, arguments.repeats, arguments.ways)]
    show(rows)
    arguments.out.write_text(json.dumps({"jax": jax.__version__, "devices": DEVICES, "rows": rows}, indent=1) + "\n")
    print(f"figures in {arguments.out}")


if __name__ == "__main__":
    main()
