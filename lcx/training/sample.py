"""Parts of a stage's model, run for a moment as training runs them: what a forecast of its time is made of.

Legend: T tokens of a row, N heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcx.adapters.freeze import join, split
from lcx.attention.attend import attend
from lcx.attention.plan import choose_kernel
from lcx.attention.spec import Blocks
from lcx.core import processes
from lcx.core.batch import Batch
from lcx.core.mask import visible_pairs
from lcx.core.mesh import axis_size
from lcx.core.param_spec import paths_of
from lcx.core.trees import Tree, num_elements
from lcx.model.config import is_local
from lcx.model.flops import step_flops
from lcx.model.loss import loss_sums
from lcx.model.transformer import LayerInputs, block, cast_params, constrain
from lcx.training.builder import BuiltStage
from lcx.training.stages import RunConfig
from lcx.training.step import TrainStep, compiler_options

PASS_CPU, PASS_DEVICE = 2e10, 1e13
"""Operations of a measured pass on a host and on each accelerator: a fraction of a second."""

VOCABULARY, SHORTEST = 8192, 256
"""The most entries of the vocabulary in a measured loss, and the fewest tokens of a row that is cut for a measurement."""

TILED, WORTH = 1024, 2e9
"""The fewest tokens of a row in which attention is measured on a CPU, and operations in it beside which all else does not count."""


class Sample:
    """A period of a stage's layers and some of its vocabulary, with weights that mean nothing."""

    def __init__(self, run: RunConfig, built: BuiltStage):
        period = min(len(run.model.pattern), run.model.num_layers)
        self.config = dataclasses.replace(run.model, num_layers=period, vocab_size=min(run.model.vocab_size, VOCABULARY))
        self.arch = dataclasses.replace(built.arch, config=self.config)
        self.stage, self.buffers, self.mesh = built.stage, built.buffers, built.mesh
        self.is_cpu = built.mesh.devices.flat[0].platform == "cpu"
        table = dataclasses.replace(run, model=self.config).specs(built.schemes, built.stage.length)
        self.step = TrainStep(
            self.arch, tuple(paths_of(table)), built.step.optim, built.stage.steps, built.mesh, 1, built.step.lora
        )
        state = self.step.abstract_state()
        noise = np.random.default_rng(0).normal(scale=0.02, size=4099).astype(np.float32)
        self.params, self.frozen, self._gradients = (
            jax.tree.map(functools.partial(_filled, noise), tree) for tree in (state.params, state.frozen, state.params)
        )
        self._opt_state = jax.tree.map(functools.partial(_filled, np.zeros(1)), state.opt_state)

    def shape(self) -> tuple[int, int]:
        """Rows and T of a microbatch of the stage, with fewer rows and then shorter ones where a layer over it would take long."""
        layer = dataclasses.replace(self.config, num_layers=1, vocab_size=1)
        most = PASS_CPU if self.is_cpu else PASS_DEVICE * self.mesh.size
        pieces, unit = axis_size(self.mesh, "batch"), 2 * axis_size(self.mesh, "sequence")
        rows, length = self.stage.batch_size // self.stage.accumulate, self.stage.seq_len
        while step_flops(layer, rows, length) > most and rows > pieces:
            rows = max(pieces, rows // 2 // pieces * pieces)
        while step_flops(layer, rows, length) > most and length >= 2 * max(SHORTEST, unit):
            length = length // 2 // unit * unit
        return rows, length

    def layer(self) -> float:
        """Seconds a token of a layer without its attention, forward and backward."""
        (rows, length), (own, others) = self.shape(), (self.params, self.frozen)

        def energy(own: Tree, x: jax.Array, others: Tree) -> jax.Array:
            params = cast_params(join(own, others), self.arch)
            first = jax.tree.map(lambda w: w[0], params["layers"])
            y, _, _ = block(first, constrain(x), self.arch, _unattended)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        run = self._compiled(jax.grad(energy, argnums=(0, 1)))
        x = jnp.full((rows, length, self.config.model_dim), 0.1, self.arch.execution.compute_dtype)
        return self._seconds(lambda: run(own, x, others)) / (rows * length)

    def attention(self, kind: str) -> float:
        """Seconds a visited pair of a query and a key (`visited`) of one layer of a kind, forward and backward.

        On a CPU the rows are cut to a few tiles: a pair takes as long in them as in a long row.
        """
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        spec, (rows, length) = self.arch.attention(kind), self.shape()
        if self.is_cpu:
            unit, length, pieces = 2 * axis_size(self.mesh, "sequence"), self.stage.seq_len, axis_size(self.mesh, "batch")
            rows = pieces * min(2, self.stage.batch_size // self.stage.accumulate // pieces)
            pairs = WORTH / (14 * rows * N * H)  # seven products, two operations a number
            while length >= 2 * TILED and length % (2 * unit) == 0 and self.visited(kind, rows, length // 2) >= pairs:
                length //= 2
        batch = self._batch(rows, length)
        params = join(self.params, self.frozen)

        def energy(q: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, params: Tree, buffers: Tree) -> jax.Array:
            inputs, index = LayerInputs.build(self.arch, kind, params, buffers, batch.index), batch.index
            o = attend(
                spec, constrain(q), constrain(k), constrain(v), index, index, q_tables=inputs.tables, k_tables=inputs.tables,
                bias_params=inputs.bias, query_scale=inputs.query_scale,
            )  # fmt: skip
            return jnp.sum(jnp.square(o.astype(jnp.float32)))

        run = self._compiled(jax.grad(energy, argnums=(0, 1, 2)))
        q, k, v = (jnp.full((rows, length, heads, H), 0.1, self.arch.execution.compute_dtype) for heads in (N, K, K))
        seconds = self._seconds(lambda: run(q, k, v, batch, params, self.buffers))
        return seconds / (rows * self.visited(kind, rows, length))

    def visited(self, kind: str, rows: int, length: int, group: int | None = None) -> int:
        """Pairs that a kernel visits in a row of `length` tokens: those that the mask shows, on a CPU whole tiles of them."""
        window = self.config.window if is_local(kind) else group
        if not self.is_cpu:
            return visible_pairs(length, window)
        spec, config = self.arch.attention(kind), self.config
        sizes = {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        part = self.arch.execution.at_once(length)
        blocks = choose_kernel(spec, part, part, "cpu", batch=rows, **sizes).blocks or Blocks(part, part)
        starts = range(0, length, blocks.q)
        firsts = (0 if window is None else max(0, start - window + 1) // blocks.k for start in starts)
        ends = (-(-min(start + blocks.q, length) // blocks.k) for start in starts)
        return sum(end - first for first, end in zip(firsts, ends, strict=True)) * blocks.q * blocks.k

    def loss(self) -> float:
        """Seconds a token and an entry of the vocabulary of the loss, forward and backward."""
        (rows, length), vocab = self.shape(), self.config.vocab_size
        own, others = split(self.params, lambda path: path.split("/")[0] in ("embed", "head"))

        def nll(own: Tree, scale: jax.Array, others: Tree, batch: Batch) -> jax.Array:
            states = constrain((batch.tokens % 7 + 1)[..., None].astype(scale.dtype) * scale)
            return loss_sums(join(own, others), states, batch, self.arch).nll

        run = self._compiled(jax.grad(nll, argnums=(0, 1)))
        scale = jnp.full((1, 1, self.config.model_dim), 0.01, self.arch.execution.compute_dtype)
        others, batch = join(others, self.frozen), self._batch(rows, length)
        return self._seconds(lambda: run(own, scale, others, batch)) / (rows * length * vocab)

    def update(self) -> float:
        """Seconds a trained number of the optimizer's update."""

        def new(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
            updates, state = self.step.transform.update(gradients, state, params, step=jnp.zeros((), jnp.int32))
            return optax.apply_updates(params, updates), state

        run, held = self._compiled(new, donate_argnums=(0, 1)), [self.params, self._opt_state]

        def once() -> Any:
            held[:] = run(*held, self._gradients)
            return held

        seconds = self._seconds(once)
        self.params, self._opt_state = held
        return seconds / num_elements(self.params)

    def _batch(self, rows: int, length: int) -> Batch:
        local = self.step.local_rows(rows, length)
        tokens = np.random.default_rng(1).integers(0, self.config.vocab_size, (local.stop - local.start, length + 1))
        return self.step.to_device(jax.tree.map(np.asarray, Batch.from_tokens(tokens)), rows)

    def _compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=compiler_options(self.mesh), **options)

    def _seconds(self, run: Callable[[], Any]) -> float:
        """The median of a few runs after the first, which compiles."""
        taken: list[float] = []
        with jax.set_mesh(self.mesh):
            jax.block_until_ready(run())
            # As often in every process, since each run is one of all.
            while len(taken) < 5 and max(processes.exchange("sample", sum(taken))) < 0.2:
                begin = time.perf_counter()
                jax.block_until_ready(run())
                taken.append(time.perf_counter() - begin)
        return statistics.median(taken)


def _unattended(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    """In place of attention: of its shapes, and with a gradient for all three."""
    group = q.shape[2] // k.shape[2]
    return q * jnp.repeat(k + v, group, axis=2), None


def _filled(noise: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    whole = np.resize(noise, leaf.shape).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])
