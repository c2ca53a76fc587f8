"""Matrix products of SmolLM2-135M's shapes in float32: how fast JAX and torch multiply on this CPU, and so how short a step can be.

    python benchmarks/products.py --tokens=2048

A training step of such a model is products of `tokens` rows by the weights, three for each, and attention. Each product is timed in
turns; its rate is the median over the turns. The bound is what all products of a step would take at these rates, attention left
out: neither library's step can be shorter, whatever else is improved. Figures of whole steps are those of `adapters.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tables
import torch
from absl import app, flags
from process import processor
from rich.console import Console
from rich.markdown import Markdown
from sides.side import cores

DIM, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 576, 1536, 30, 9, 3, 64, 49152
WEIGHTS = {
    "q, o": (DIM, HEADS * HEAD_DIM, 2 * LAYERS),
    "k, v": (DIM, KV_HEADS * HEAD_DIM, 2 * LAYERS),
    "gate, up": (DIM, MLP, 2 * LAYERS),
    "down": (MLP, DIM, LAYERS),
    "head": (DIM, VOCAB, 1),
}
"""Name -> inputs and outputs of a weight, and how many of them a model has."""
PRODUCTS = ("y = x w", "dx = dy wᵀ", "dw = xᵀ dy")
HERE = Path(__file__).resolve().parent

FLAGS = flags.FLAGS
flags.DEFINE_integer("tokens", 2048, "Rows of the products.")
flags.DEFINE_integer("rounds", 7, "Turns of each product.", lower_bound=1)
flags.DEFINE_string("out", str(HERE / "results" / "products.json"), "Where the figures are written.")


def of_jax(tokens: int, inputs: int, outputs: int) -> list[Callable[[], Any]]:
    """The three products of a weight, compiled; each call waits for its result."""
    x, w, dy = jnp.ones((tokens, inputs)), jnp.ones((inputs, outputs)), jnp.ones((tokens, outputs))
    by_side = ((x, w, ((1,), (0,))), (dy, w, ((1,), (1,))), (x, dy, ((0,), (0,))))

    def compiled(a: jax.Array, b: jax.Array, over: tuple) -> Callable[[], Any]:
        run = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (over, ((), ()))))
        return lambda: run(a, b).block_until_ready()

    return [compiled(*one) for one in by_side]


def of_torch(tokens: int, inputs: int, outputs: int) -> list[Callable[[], Any]]:
    """The same; torch keeps a weight as its outputs by its inputs."""
    x, w, dy = torch.ones(tokens, inputs), torch.ones(outputs, inputs), torch.ones(tokens, outputs)
    return [lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x]


def seconds(run: Callable[[], Any]) -> float:
    """Of one product, over a twentieth of a second of them."""
    run()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < 0.05:
        run()
        times += 1
    return (time.perf_counter() - start) / times


def main(argv: list[str]) -> None:
    """Measure, write, show."""
    del argv
    rows, bound = [], {"jax": 0.0, "torch": 0.0}
    load = os.getloadavg()[0]
    for name, (inputs, outputs, count) in WEIGHTS.items():
        sides = {"jax": of_jax(FLAGS.tokens, inputs, outputs), "torch": of_torch(FLAGS.tokens, inputs, outputs)}
        for i, product in enumerate(PRODUCTS):
            turns: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(FLAGS.rounds):
                for side, runs in sides.items():
                    turns[side].append(seconds(runs[i]))
            taken = {side: statistics.median(values) for side, values in turns.items()}
            operations = 2 * FLAGS.tokens * inputs * outputs
            rows.append({"weight": name, "product": product, "operations": operations, "seconds": taken})
            for side, value in taken.items():
                bound[side] += count * value
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    machine = {"processor": processor(), "cores": cores(), "load_before": load, "versions": versions}
    tokens_per_second = {side: FLAGS.tokens / value for side, value in bound.items()}
    found = {"machine": machine, "tokens": FLAGS.tokens, "products": rows, "bound_tokens_per_second": tokens_per_second}
    Path(FLAGS.out).write_text(json.dumps(found, indent=1) + "\n")
    Console().print(Markdown(tables.products(found)))


if __name__ == "__main__":
    app.run(main)
