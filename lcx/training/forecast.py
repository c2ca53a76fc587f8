"""How long a run will take, said before its first step.

A stage that has begun takes what its steps have taken so far. For others parts of the model are run for a moment, as training runs
them: one period of the layers forward and backward, the loss over some of the vocabulary, and the optimizer's update. Time grows
with the number of each, and that of a layer with its tokens and with the keys that they see, so short rows tell of long ones.

Legend: T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lcx.adapters.freeze import join, split
from lcx.core.batch import Batch
from lcx.core.mesh import axis_size
from lcx.core.numbers import duration
from lcx.core.param_spec import paths_of
from lcx.core.trees import Tree, num_elements
from lcx.model.architecture import Architecture
from lcx.model.config import ModelConfig, is_local
from lcx.model.flops import step_flops, visible_pairs
from lcx.model.loss import loss_sums
from lcx.model.transformer import constrain, hidden_states, remat_policy
from lcx.training.builder import BuiltStage, StageBuilder
from lcx.training.step import TrainStep, compiler_options

NEGLIGIBLE = 1e10
"""Operations of a run that are not worth a measurement: any machine does them in a few seconds."""

PROBE_CPU, PROBE_DEVICE = 4e10, 1e13
"""Operations of a measured pass over one period of layers, on a host and on each accelerator: a fraction of a second."""

VOCABULARY, SHORTEST = 8192, 256
"""The most entries of the vocabulary in a measured loss, and the fewest tokens of a row that is cut for a measurement."""

RECENT = 20
"""Steps that a stage's time is the median of."""


def forecast(builder: StageBuilder, index: int, at: int, rows: Sequence[Mapping[str, Any]], fewer: str) -> str:
    """The time left to a run at step `at` of stage `index`, with `rows` of metrics, as a sentence; `fewer` names its steps."""
    stages = builder.run.stages
    left = {i: stage.steps - (at if i == index else 0) for i, stage in enumerate(stages) if i >= index}
    left = {i: steps for i, steps in left.items() if steps}
    known = {i: seconds for i in left if (seconds := own_seconds(rows, i, stages[i].batch_size * stages[i].seq_len)) is not None}
    unknown = [i for i in left if i not in known]
    sizes = {i: step_flops(builder.run.model, stages[i].batch_size, stages[i].seq_len) * left[i] for i in unknown}
    if sum(sizes.values()) > NEGLIGIBLE:
        known |= step_seconds([builder.build(i) for i in unknown], builder)
    total = sum(known.get(i, 0.0) * steps for i, steps in left.items())
    more = " more" if at or index else ""
    apart = "without compilation and evaluations"
    if len(known) < len(left) and total < 30:
        return f"the steps take less than a minute{more}, {apart}"
    each = ", ".join(f"{stages[i].name}: {duration(known.get(i, 0.0) * steps)}" for i, steps in left.items())
    shorter = f"; for less, lower {fewer}" if total > 600 else ""
    return f"the steps take about {duration(total)}{more} on this machine ({each}), {apart}{shorter}"


def own_seconds(rows: Sequence[Mapping[str, Any]], index: int, tokens: int) -> float | None:
    """Seconds of a step of stage `index`, of `tokens` tokens, by the newest rows of `metrics.jsonl`; None before its third step."""
    speeds = [row["tokens_per_second"] for row in rows if row["stage_index"] == index][-RECENT:]
    return tokens / statistics.median(speeds) if len(speeds) > 2 else None


def step_seconds(stages: Sequence[BuiltStage], builder: StageBuilder) -> dict[int, float]:
    """Seconds of a step of each stage, by its index, from measurements that alike stages share."""
    alike: dict[Any, list[BuiltStage]] = {}
    for built in stages:
        optim = built.step.optim
        alike.setdefault((_arch(built), built.mesh, optim.name, optim.freeze), []).append(built)
    found: dict[int, float] = {}
    for group in alike.values():
        group.sort(key=lambda built: built.stage.seq_len)
        found |= _measured(group, builder)
    return found


def _measured(group: Sequence[BuiltStage], builder: StageBuilder) -> dict[int, float]:
    model, sample, points = builder.run.model, Sample(group[-1], builder), []
    wanted = [(built.stage.batch_size // built.stage.accumulate, built.stage.seq_len) for built in group]
    shapes = probe_shapes(sample.config, wanted, sample.mesh)
    for rows, length in shapes:
        points.append((seen(model, length, group[-1].stage.shifted_group), sample.layers(rows, length) / (rows * length)))
    rows, length = shapes[0]
    per_token = sample.loss(rows, length) / (rows * length) * model.vocab_size / sample.config.vocab_size
    per_number = sample.update() / num_elements(sample.params)
    found = {}
    for built in group:
        tokens, trained = built.stage.batch_size * built.stage.seq_len, num_elements(built.step.abstract_state().params)
        layers = at_keys(points, seen(model, built.stage.seq_len, built.stage.shifted_group))
        layers *= model.num_layers / sample.config.num_layers
        found[built.index] = tokens * (layers + per_token) + trained * per_number
    return found


def probe_shapes(sample: ModelConfig, shapes: Sequence[tuple[int, int]], mesh: Mesh) -> list[tuple[int, int]]:
    """One or two shapes (rows, T) to measure for microbatches of `shapes`, which are sorted by T: with fewer rows, and then with
    shorter ones, where the sample's layers would take long. Two tell what longer rows cost."""
    layers = dataclasses.replace(sample, vocab_size=1)
    most = PROBE_CPU if mesh.devices.flat[0].platform == "cpu" else PROBE_DEVICE * mesh.size
    pieces, unit = axis_size(mesh, "batch"), 2 * axis_size(mesh, "sequence")

    def affordable(rows: int, length: int) -> tuple[int, int]:
        while step_flops(layers, rows, length) > most and rows > pieces:
            rows = max(pieces, rows // 2 // pieces * pieces)
        while step_flops(layers, rows, length) > most and length > SHORTEST * unit:
            length = length // 2 // unit * unit
        return rows, length

    long = affordable(*shapes[-1])
    if long[1] == shapes[-1][1]:
        return list(dict.fromkeys([affordable(*shapes[0]), long]))
    short = min(affordable(*shapes[0]), (pieces, max(unit, long[1] // 4 // unit * unit)), key=lambda shape: shape[1])
    return [short, long]


def seen(model: ModelConfig, length: int, group: int | None = None) -> float:
    """Keys that a token of a row sees, the mean over the row and over a period of layers; `group` is that of shifted attention."""
    kinds = model.pattern[: model.num_layers]
    return sum(visible_pairs(length, model.window if is_local(kind) else group) for kind in kinds) / length / len(kinds)


def at_keys(points: Sequence[tuple[float, float]], keys: float) -> float:
    """The value at `keys` of the line through one or two points (keys, value); it never falls."""
    (x, y), (x_long, y_long) = points[0], points[-1]
    if x == x_long:
        return (y + y_long) / 2
    slope = (y_long - y) / (x_long - x)
    if slope <= 0:
        return (y + y_long) / 2
    # Below both there is no less than what the short one's share of its keys leaves.
    return max(y_long + slope * (keys - x_long), min(y, y_long) * 0.1)


def sample_config(model: ModelConfig, remat: str) -> ModelConfig:
    """One period of a model's layers, two if anything of them is recomputed, and some of its vocabulary."""
    # Outside a loop, which needs two, XLA's CPU backend finds first results again and recomputes nothing.
    count = len(model.pattern) * (1 if remat == "none" else 2)
    return dataclasses.replace(model, num_layers=min(count, model.num_layers), vocab_size=min(model.vocab_size, VOCABULARY))


class Sample:
    """A period or two of a stage's layers and some of its vocabulary, as training computes them, with weights that mean nothing."""

    def __init__(self, built: BuiltStage, builder: StageBuilder):
        model, run = builder.run.model, builder.run
        self.config = sample_config(model, _arch(built).execution.remat)
        self.arch, self.buffers, self.mesh = dataclasses.replace(_arch(built), config=self.config), built.buffers, built.mesh
        table = dataclasses.replace(run, model=self.config).specs(built.schemes, built.stage.length)
        specs = tuple(paths_of(table))
        self.step = TrainStep(self.arch, specs, built.step.optim, built.stage.steps, built.mesh, 1, built.step.lora)
        state = self.step.abstract_state()
        noise = np.random.default_rng(0).normal(scale=0.02, size=4099).astype(np.float32)
        self.params, self.frozen, self._gradients = (
            jax.tree.map(functools.partial(_filled, noise), tree) for tree in (state.params, state.frozen, state.params)
        )
        self._opt_state = jax.tree.map(functools.partial(_filled, np.zeros(1)), state.opt_state)

    def layers(self, rows: int, length: int) -> float:
        """Seconds of the sample's layers over `rows` rows of `length` tokens, forward and backward."""

        def energy(params: Tree, frozen: Tree, batch: Batch, buffers: Tree) -> jax.Array:
            states = hidden_states(_joined(params, frozen), buffers, self.arch, batch)[0]
            return jnp.sum(jnp.square(states.astype(jnp.float32)))

        run = self._compiled(jax.grad(energy))
        batch = self._batch(rows, length)
        return self._seconds(lambda: run(self.params, self.frozen, batch, self.buffers))

    def loss(self, rows: int, length: int) -> float:
        """Seconds of the loss over the sample's vocabulary, forward and backward."""
        own, others = split(self.params, lambda path: path.split("/")[0] in ("embed", "head"))

        def nll(own: Tree, scale: jax.Array, others: Tree, batch: Batch) -> jax.Array:
            states = constrain((batch.tokens % 7 + 1)[..., None].astype(scale.dtype) * scale)
            return loss_sums(_joined(own, others), states, batch, self.arch).nll

        run = self._compiled(jax.grad(nll, argnums=(0, 1)))
        scale = jnp.full((1, 1, self.config.model_dim), 0.01, self.arch.execution.compute_dtype)
        others, batch = _joined(others, self.frozen), self._batch(rows, length)
        return self._seconds(lambda: run(own, scale, others, batch))

    def update(self) -> float:
        """Seconds of the optimizer's update of the sample's trained parameters."""

        def new(params: Tree, state: Tree, gradients: Tree) -> tuple[Tree, Tree]:
            updates, state = self.step.transform.update(gradients, state, params, step=jnp.zeros((), jnp.int32))
            return optax.apply_updates(params, updates), state

        run, held = self._compiled(new, donate_argnums=(0, 1)), [self.params, self._opt_state]

        def once() -> Any:
            held[:] = run(*held, self._gradients)
            return held

        seconds = self._seconds(once)
        self.params, self._opt_state = held
        return seconds

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
            while len(taken) < 5 and sum(taken) < 0.3:
                begin = time.perf_counter()
                jax.block_until_ready(run())
                taken.append(time.perf_counter() - begin)
        return statistics.median(taken)


def _arch(built: BuiltStage) -> Architecture:
    """The stage's architecture, which recomputes on short rows what it recomputes on its own."""
    execution = built.arch.execution
    policy = remat_policy(execution, built.stage.seq_len)
    return dataclasses.replace(built.arch, execution=dataclasses.replace(execution, remat=policy))


def _joined(params: Tree, frozen: Tree) -> Tree:
    return join(params, frozen) if frozen else params


def _filled(noise: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    whole = np.resize(noise, leaf.shape).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])
