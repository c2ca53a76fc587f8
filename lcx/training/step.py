"""One jitted, donated, sharded training step over any mesh.

A microbatch gives sums and the gradient of the sum; the step adds them up in float32 over microbatches and devices and divides
once. Positional arrays are an argument, so another theta compiles nothing.

Legend: B batch rows, T tokens, A microbatches of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.adapters import lora
from lcx.adapters.freeze import join, split
from lcx.adapters.lora import LoraConfig
from lcx.attention.parallel.dealing import deal
from lcx.attention.parallel.documents import Documents
from lcx.attention.parallel.sequence_layout import arrange
from lcx.core.batch import Batch
from lcx.core.host import give_back_freed_memory
from lcx.core.mesh import fitting_spec, named_sharding, partition_spec
from lcx.core.param_spec import ParamSpec, abstract, initialize, is_spec, paths_of, shardings
from lcx.core.quantized import is_quantized
from lcx.core.trees import Tree, joined, map_paths, paths
from lcx.model import recurrent
from lcx.model.architecture import Architecture, row_layout, windows
from lcx.model.loss import LossSums, loss_sums, unpadded_tokens
from lcx.model.transformer import hidden_states
from lcx.training.optimizer import OptimConfig, is_trained, learning_rate, optimizer

Table = tuple[tuple[str, ParamSpec], ...]
"""A spec tree as `(path, spec)` pairs: hashable, so that it can key a compiled step."""


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    `params` float32, the trained ones; `frozen` the others, perhaps quantised, which a step hands on as they are; `opt_state` as
    optax made it; `step` int32, steps of this stage, dropped ones included; `skipped` and `in_a_row` int32, how many non-finite
    steps were dropped in the run and without a good one in between.
    """

    params: Tree
    frozen: Tree
    opt_state: Tree
    step: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array

    @property
    def all_params(self) -> Tree:
        """Trained and frozen parameters in one tree."""
        return join(self.params, self.frozen)


@dataclasses.dataclass(frozen=True)
class Share:
    """What the devices of this process hold of a batch `[B, T]`: `rows`, and `pieces` (start, stop) of T as the layout deals it.

    `columns` int `[m]` are the places in a row, before they are dealt, of the tokens of all pieces, one piece after the other. In
    rows that are dealt by their documents they are `[B, m]`, with the `reach` of each token as in `Index`, and other `segments`.
    """

    rows: slice
    pieces: tuple[tuple[int, int], ...]
    columns: np.ndarray
    reach: np.ndarray | None = None
    segments: np.ndarray | None = None


class TrainStep:
    """The compiled step of one architecture, optimizer and mesh; serves every theta and every batch of one shape.

    `table` holds adapters too, if there is a `lora`. `compiles` counts how often the step was traced.
    """

    def __init__(
        self,
        arch: Architecture,
        table: Table,
        optim: OptimConfig,
        steps: int,
        mesh: Mesh,
        accumulate: int = 1,
        lora: LoraConfig | None = None,
    ):
        self.arch, self.optim, self.mesh, self.accumulate, self.lora = arch, optim, mesh, accumulate, lora
        self.compiles = 0
        self._programs: dict[tuple[tuple[int, ...], jax.tree_util.PyTreeDef], jax.stages.Compiled] = {}
        self.specs = flax.traverse_util.unflatten_dict(dict(table), sep="/")
        self.transform = optimizer(optim, steps, self.specs)
        self._schedule = learning_rate(optim, steps)
        trained, frozen = self.split(self.specs)
        self._frozen_specs = dict(paths_of(frozen))
        self._abstract_frozen = self._as_held(frozen)
        self._param_shardings = shardings(trained, mesh)
        self._frozen_shardings = jax.tree.map(lambda x: x.sharding, self._abstract_frozen)
        self._frozen_places = dict(paths(self._frozen_shardings))
        self._batch_sharding = named_sharding(mesh, ("batch", "sequence"))
        self._row_sharding = named_sharding(mesh, ("batch",))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self.state_shardings = self._state_shardings()
        out = (self.state_shardings, self._replicated)
        shardings_in = (self.state_shardings, None, None)
        compiled = functools.partial(jax.jit, donate_argnums=0, in_shardings=shardings_in, compiler_options=compiler_options(mesh))
        self._step = compiled(self._train, out_shardings=out)
        self._open_step = compiled(functools.partial(self._train, gradients=True), out_shardings=(*out, self._param_shardings))

    def __call__(self, state: TrainState, batch: Batch, buffers: Mapping[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        """The next state and this step's metrics; `state` is donated.

        `batch` is from `to_device`, `buffers` is from `model.architecture.build_architecture`. A step whose loss
        or gradient is not finite, or whose weights are all zero, leaves parameters and optimizer as they were, and says so in `ok`.
        """
        if not self.is_compiled_for(batch):
            self.compile(state, batch, buffers)
        with jax.set_mesh(self.mesh):
            return self._programs[_form(batch)](state, batch, buffers)

    def is_compiled_for(self, batch: Batch) -> bool:
        """Whether a call with such a batch compiles nothing."""
        return _form(batch) in self._programs

    def compile(self, state: TrainState, batch: Batch, buffers: Mapping[str, Any]) -> jax.stages.Compiled:
        """The program of such a batch, compiled and kept; nothing is run, and `state` is kept."""
        return self.keep(batch, self.lower(state, batch, buffers).compile())

    def lower(self, state: TrainState, batch: Batch, buffers: Mapping[str, Any]) -> jax.stages.Lowered:
        """The program of such a batch before it is compiled."""
        with jax.set_mesh(self.mesh):
            return self._step.lower(state, batch, buffers)

    def keep(self, batch: Batch, program: jax.stages.Compiled) -> jax.stages.Compiled:
        """Take a compiled program for batches such as this one; returns it. The memory that its compiler used is given back."""
        self._programs[_form(batch)] = program
        give_back_freed_memory()
        return program

    def trace(self, state: TrainState, batch: Batch, buffers: Mapping[str, Any]) -> jax.stages.Traced:
        """The step of such arguments, which may be abstract, traced: it has a jaxpr, and can be lowered and compiled."""
        with jax.set_mesh(self.mesh):
            return self._step.trace(state, batch, buffers)

    def with_gradients(self, state: TrainState, batch: Batch, buffers: Mapping[str, Any]) -> tuple[TrainState, dict, Tree]:
        """As a call, and the float32 gradient of (Σ w·ℓ + z-loss) / Σ w (+ the experts' balance) before clipping; for tests and
        diagnosis."""
        with jax.set_mesh(self.mesh):
            return self._open_step(state, batch, buffers)

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """A tree of all parameters as those that are trained and those that are frozen."""
        return split(params, lambda path: is_trained(self.optim, self.lora, path))

    @property
    def balanced(self) -> bool:
        """Whether rows are dealt by their documents."""
        return self.arch.execution.context_layout == "balanced" and self.mesh.shape["ring"] > 1

    def share(self, rows: int, length: int, documents: Sequence[Documents] | None = None) -> Share:
        """What this process's devices hold of a `[rows, length]` batch: all that its loader has to make.

        `documents` of this process's rows, if they are to be dealt by them (`balanced`).
        """
        ring, held = self.mesh.shape["ring"], self._batch_sharding.addressable_devices_indices_map((rows, length)).values()
        pieces = sorted({index[1].indices(length)[:2] for index in held})
        places, own = np.concatenate([np.arange(start, stop) for start, stop in pieces]), self.local_rows(rows, length)
        if documents is None:
            layout = row_layout(self.arch.config, self.arch.execution, length, self.mesh)
            return Share(own, tuple(pieces), arrange(np.arange(length)[None], layout, ring)[0, places])
        dealt = [deal(row, ring, windows(self.arch.config)) for row in documents]
        columns = np.stack([row.columns[places] for row in dealt])
        reach = np.stack([np.repeat(row.reach, row.length)[places] for row in dealt])
        segments = np.stack([row.segments(whole)[places] for row, whole in zip(dealt, documents, strict=True)])
        return Share(own, tuple(pieces), columns, reach.astype(np.int32), segments.astype(np.int32))

    def local_rows(self, rows: int, length: int) -> slice:
        """Rows of a `[rows, length]` batch that this process's devices hold: all that its loader has to make."""
        indices = self._batch_sharding.addressable_devices_indices_map((rows, length)).values()
        return slice(min(i[0].start or 0 for i in indices), max(rows if i[0].stop is None else i[0].stop for i in indices))

    def to_device(self, batch: Batch, rows: int, share: Share | None = None, length: int | None = None) -> Batch:
        """Host arrays of this process's rows as global arrays `[rows, T]`, in the mesh's sequence layout, or `[rows]`.

        With its `share` of rows of `length` tokens, the arrays have that share's columns alone, in its order.
        """
        ring, length = self.mesh.shape["ring"], length or batch.tokens.shape[1]
        layout = row_layout(self.arch.config, self.arch.execution, length, self.mesh)
        if share is not None and share.reach is not None:
            batch = batch.replace(reach=share.reach, segments=share.segments, layout="balanced")
        else:
            batch = (batch if share is not None else arrange(batch, layout, ring)).replace(layout=layout)
        first = self.local_rows(rows, length).start
        pieces = ((0, length),) if share is None else share.pieces
        sizes = [stop - start for start, stop in pieces]
        places = {start: place for (start, _), place in zip(pieces, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True)}

        def one(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(rows)
                own = x[start - first : stop - first]
                if x.ndim == 1:
                    return own
                begin, end, _ = index[1].indices(length)
                at = begin if share is None else places[begin]
                return own[:, at : at + end - begin]

            sharding = self._row_sharding if x.ndim == 1 else self._batch_sharding
            return jax.make_array_from_callback((rows, *(length,)[: x.ndim - 1]), sharding, part)

        return jax.tree.map(one, batch)

    def init_state(self, key: jax.Array) -> TrainState:
        """A fresh state, made in place on the mesh."""
        # This runs once; on CPU, optimizing its random bits would take longer than everything else in the start of a small run.
        options = {"xla_backend_optimization_level": 0} if self.mesh.devices.flat[0].platform == "cpu" else None
        make = jax.jit(
            lambda key: self._at_step_zero(*self.split(lora.start(initialize(self.specs, key)))),
            out_shardings=self.state_shardings,
            compiler_options=options,
        )
        return make(key)

    def state_from_params(self, params: Tree) -> TrainState:
        """A state at step 0 with these parameters (any sharding) and a fresh optimizer; `params` is not to be used afterwards."""
        params, frozen = self.split(params)
        params = jax.device_put(params, self._param_shardings)
        none: dict[str, Any] = {"params": None, "frozen": None}
        rest = jax.jit(
            lambda params: self._at_step_zero(params, {}).replace(**none), out_shardings=self.state_shardings.replace(**none)
        )
        return rest(params).replace(params=params, frozen=self.place_frozen(frozen))

    def place_frozen(self, frozen: Tree) -> Tree:
        """Frozen parameters (any sharding) where the step wants them, as it holds them."""
        return map_paths(self.hold, frozen)

    def hold(self, path: str, x: Any) -> Any:
        """A parameter of any sharding: a frozen one where the step wants it, as it holds it; others as they are."""
        spec = self._frozen_specs.get(path)
        if spec is None or spec.shape != x.shape:
            return x
        held, where = functools.partial(lora.held, path, spec=spec, config=self.lora), self._frozen_places[path]
        if is_quantized(where) and not is_quantized(x):
            return jax.jit(held, out_shardings=where)(jax.device_put(x, named_sharding(self.mesh, spec.logical_axes)))
        return jax.device_put(held(x), where)

    def _as_held(self, frozen: Tree) -> Tree:
        """Abstract frozen parameters as they are held; scales of quantised ones lie with their weights as far as they divide."""

        def one(path: tuple, spec: ParamSpec) -> Any:
            x = jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=named_sharding(self.mesh, spec.logical_axes))
            found = jax.eval_shape(functools.partial(lora.held, joined(path), spec=spec, config=self.lora), x)

            def placed(part: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
                axes = fitting_spec(spec.logical_axes, part.shape, self.mesh)
                where = NamedSharding(self.mesh, axes) if is_quantized(found) else x.sharding
                return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)

            return jax.tree.map(placed, found)

        return jax.tree_util.tree_map_with_path(one, frozen, is_leaf=is_spec)

    def _at_step_zero(self, params: Tree, frozen: Tree) -> TrainState:
        """The state at step 0 around parameters."""
        # Three arrays, not one three times: donating one buffer twice is an error.
        zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
        return TrainState(params, frozen, self.transform.init(params), *zeros)

    def abstract_state(self) -> TrainState:
        """`ShapeDtypeStruct`s with shardings, for a restore that needs no initialised state."""
        shapes = jax.eval_shape(self._at_step_zero, self.split(abstract(self.specs))[0], self._abstract_frozen)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.state_shardings)

    def _state_shardings(self) -> TrainState:
        shapes = jax.eval_shape(self._at_step_zero, *self.split(abstract(self.specs)))
        by_path = {
            path: (leaf.shape, sharding)
            for (path, leaf), (_, sharding) in zip(paths(shapes.params), paths(self._param_shardings), strict=True)
        }

        def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            # A moment lies where its parameter does: its path ends in the parameter's, and it has the same shape.
            words = joined(path).split("/")
            ends = ("/".join(words[i:]) for i in range(len(words)))
            shape, sharding = next((by_path[end] for end in ends if end in by_path), (None, None))
            return sharding if shape == leaf.shape else self._replicated

        opt = jax.tree_util.tree_map_with_path(one, shapes.opt_state)
        return TrainState(self._param_shardings, self._frozen_shardings, opt, *3 * [self._replicated])

    def _train(self, state: TrainState, batch: Batch, buffers: Mapping[str, Any], gradients: bool = False) -> tuple:
        self.compiles += 1  # runs when the step is traced, never when it is executed
        gradient = self._gradient(batch.tokens.shape[1])
        balanced = self.arch.config.router_aux_weight > 0
        # What Σ w·ℓ has to be divided by, over what the load-balancing loss has to be.
        rate = jnp.sum(batch.loss_weights, dtype=jnp.float32) / jnp.maximum(unpadded_tokens(batch), 1.0) if balanced else None
        if self.accumulate == 1:
            (_, sums), grads = gradient(state.params, state.frozen, batch, buffers, rate)
        else:
            parts = microbatches(batch, self.accumulate)

            def add(carry: tuple, part: Batch) -> tuple:
                (_, sums), grads = gradient(state.params, state.frozen, part, buffers, rate)
                return jax.tree.map(jnp.add, carry, (sums, self._shard(grads))), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
            (sums, grads), _ = jax.lax.scan(add, (LossSums.zeros(batch, balanced), self._shard(zeros)), parts)
        weight = jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, self._shard(grads))
        after, metrics = self._update(state, sums, weight, grads)
        return (after, metrics, grads) if gradients else (after, metrics)

    def _update(self, state: TrainState, sums: LossSums, weight: jax.Array, grads: Tree) -> tuple[TrainState, dict]:
        """The state after the optimizer's step, or with its parameters as they were if the step is not finite; and the metrics."""
        loss, norm = sums.nll / weight, optax.global_norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm) & (sums.weight > 0)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.transform.update(grads, state.opt_state, state.params, step=state.step)
            params = optax.apply_updates(state.params, updates)

        def keep(new: Tree, old: Tree) -> Tree:
            return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

        bad = jnp.where(ok, 0, 1).astype(jnp.int32)
        after = TrainState(
            params=keep(params, state.params),
            frozen=state.frozen,
            opt_state=keep(opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + bad,
            in_a_row=(state.in_a_row + bad) * bad,
        )
        metrics = {
            "loss": loss,
            "z_loss": sums.z / weight,
            "accuracy": sums.correct / weight,
            "weight": sums.weight,
            "grad_norm": norm,
            "lr": jnp.asarray(self._schedule(state.step), jnp.float32),
            "ok": ok,
            "skipped": after.skipped,
            "in_a_row": after.in_a_row,
        }
        if sums.router_aux is not None:
            metrics["router_aux_loss"] = sums.router_aux / jnp.maximum(sums.tokens, 1.0)
        if sums.part_nll is not None:
            metrics["loss_by_part"] = sums.part_nll / sums.part_weight  # not a number for a part without rows in this step
            metrics["weight_by_part"] = sums.part_weight
        return after, metrics

    def _gradient(self, length: int) -> Callable[..., tuple[tuple[Any, LossSums], Tree]]:
        """Of `_loss` for rows of a length, as `jax.value_and_grad` has it: of whole rows, or chunk by chunk."""
        if recurrent.in_several(self.arch, length):
            return self._walked
        return jax.value_and_grad(self._loss, has_aux=True)

    def _loss(
        self, params: Tree, frozen: Tree, batch: Batch, buffers: Mapping[str, Any], rate: jax.Array | None
    ) -> tuple[jax.Array, LossSums]:
        params = join(params, frozen)
        states, router_aux = hidden_states(params, buffers, self.arch, batch)
        return self._objective(params, states, batch, router_aux, rate)

    def _walked(
        self, params: Tree, frozen: Tree, batch: Batch, buffers: Mapping[str, Any], rate: jax.Array | None
    ) -> tuple[tuple[None, LossSums], Tree]:
        sums, gradients = recurrent.sums_and_gradients(
            self._objective, lambda trained: join(trained, frozen), params, buffers, self.arch, batch
        )
        return (None, sums), gradients

    def _objective(
        self, params: Tree, states: jax.Array, batch: Batch, router_aux: jax.Array | None = None, rate: jax.Array | None = None
    ) -> tuple[jax.Array, LossSums]:
        with jax.named_scope("loss"):
            sums = loss_sums(params, states, batch, self.arch, router_aux)
        # Both sums have Σ w as denominator, which is divided out once, after the last microbatch; `rate` gives a third one its own.
        total = sums.nll + self.optim.z_loss * sums.z
        return (total if rate is None else total + self.arch.config.router_aux_weight * rate * sums.router_aux), sums

    def _shard(self, grads: Tree) -> Tree:
        return jax.tree.map(jax.lax.with_sharding_constraint, grads, self._param_shardings)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for programs of training on a mesh."""
    # XLA holds back on wide vectors for the sake of older processors' clocks; a step gains 3% by them.
    return {"xla_cpu_prefer_vector_width": 512} if mesh.devices.flat[0].platform == "cpu" else None


def _form(batch: Batch) -> tuple[tuple[int, ...], jax.tree_util.PyTreeDef]:
    """What a compiled program is for: the shape, the layout, and which of the optional arrays there are."""
    return batch.tokens.shape, jax.tree.structure(batch)


def microbatches(batch: Batch, count: int) -> Batch:
    """`[B, T]` arrays as `[A, B / A, T]`, `[B]` as `[A, B / A]`; microbatch a takes rows a, a + A, ..., so that no row leaves
    its device."""

    def one(x: jax.Array) -> jax.Array:
        axes = (None, "batch", "sequence")[: x.ndim + 1]
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, partition_spec(axes))

    return jax.tree.map(one, batch)


@functools.lru_cache(maxsize=8)
def _cached(
    arch: Architecture, table: Table, optim: OptimConfig, steps: int, mesh: Mesh, accumulate: int, lora: LoraConfig | None
) -> TrainStep:
    return TrainStep(arch, table, optim, steps, mesh, accumulate, lora)


def train_step(
    arch: Architecture,
    specs: Tree,
    optim: OptimConfig,
    steps: int,
    mesh: Mesh,
    accumulate: int = 1,
    lora: LoraConfig | None = None,
) -> TrainStep:
    """The step for these choices, compiled once in a process however many thetas, stages or sweep points ask for it."""
    return _cached(arch, tuple(paths_of(specs)), optim, steps, mesh, accumulate, lora)
