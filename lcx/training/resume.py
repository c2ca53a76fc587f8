"""Where a run's state comes from: its own workdir, another run's, given weights, or scratch; and from stage to stage."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lcx.adapters import lora
from lcx.adapters.freeze import join, split
from lcx.core.console import say, warn
from lcx.core.errors import UserError
from lcx.core.param_spec import initialize
from lcx.core.trees import Tree, joined, paths
from lcx.training import metrics, monitor
from lcx.training.builder import BuiltStage, StageBuilder
from lcx.training.checkpoints import Store
from lcx.training.loading import missing
from lcx.training.meta import Meta
from lcx.training.stages import stage_ends
from lcx.training.step import TrainState
from lcx.training.workdir import read_config

NOISE = 1
"""Of the keys folded from a run's seed, that of the noise on initial weights."""


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A state, the stage it belongs to, and how far that stage has come; `meta` is the checkpoint's, if it came from one."""

    state: TrainState
    index: int
    stage_step: int
    meta: Meta | None = None


@dataclasses.dataclass
class StageHistory:
    """What the monitor has recorded of the current stage."""

    losses: list[float] = dataclasses.field(default_factory=list)
    before: monitor.Probe | None = None
    reference: monitor.Probe | None = None


def history_of(start: ResumePoint) -> StageHistory:
    """What the monitor had recorded of the stage that a run goes on with."""
    if start.meta is None or start.meta.probe_before is None:
        return StageHistory()
    reference = None if start.meta.reference is None else monitor.Probe(**start.meta.reference)
    return StageHistory(list(start.meta.losses), monitor.Probe(**start.meta.probe_before), reference)


def resume_point(builder: StageBuilder, store: Store) -> ResumePoint:
    """The state to go on from: own workdir, then `resume_from`, then `init_from`, then scratch."""
    found = restore_newest(builder, store)
    if found is not None:
        say(f"resuming from step {found.meta.step}, after step {found.meta.stage_step} of stage {found.meta.stage}")
        return found
    if builder.run.resume_from is not None:
        return _from_other_run(builder, Path(builder.run.resume_from))
    return from_initial_weights(builder, builder.build(0))


def from_initial_weights(builder: StageBuilder, built: BuiltStage) -> ResumePoint:
    """The start of the first stage: given weights, or scratch."""
    run = builder.run
    given = builder.initial
    if given is None:
        return ResumePoint(built.step.init_state(jax.random.key(run.seed)), 0, 0)
    params = given.load(built.mesh, built.step.hold).params
    noise = f", with noise of {run.init_noise:g} of their size" if run.init_noise else ""
    say(f"starting from the weights of {given.name} (stage {given.meta.stage}, step {given.meta.step}){noise}")
    params = lora.start(fit(params, built, run.seed, f"weights of {given.name}"))
    if run.init_noise:
        params = noisy(params, built, run.init_noise, run.seed)
    return ResumePoint(built.step.state_from_params(params), 0, 0)


def noisy(params: Tree, built: BuiltStage, share: float, seed: int) -> Tree:
    """`params` with normal noise of deviation `share` times an array's root mean square on every one that the stage trains."""
    trained, frozen = built.step.split(params)

    @jax.jit
    def add(tree: Tree, key: jax.Array) -> Tree:
        def one(path: tuple, x: jax.Array) -> jax.Array:
            drawn = jax.random.normal(jax.random.fold_in(key, zlib.crc32(joined(path).encode())), x.shape)
            return (x + share * jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))) * drawn).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(one, tree)

    # Another key than that of first values.
    return join(add(trained, jax.random.fold_in(jax.random.key(seed), NOISE)), frozen)


def completed(state: TrainState, built: BuiltStage, builder: StageBuilder, meta: Meta) -> TrainState:
    """A state read from a checkpoint, with the frozen parameters that it lacks: those of the weights that the run began with."""
    table, held = dict(paths(built.specs)), dict(paths(state.all_params))
    if len(table) == len(held):
        return state
    if builder.initial is None:
        lacking = next(path for path in table if path not in held)
        raise UserError(
            f"the checkpoint lacks {lacking}; if its run trained only a part of a model, set init_from to that model, else use the "
            "same model sizes"
        )
    rest = missing(builder.run, meta, state.all_params, built.mesh, builder.initial, built.step.hold)
    return state.replace(frozen=built.step.place_frozen(join(state.frozen, rest)))


def restore_newest(builder: StageBuilder, store: Store, check: Callable[[Meta], None] = lambda _: None) -> ResumePoint | None:
    """The newest checkpoint that still counts after the monitor's decisions; None when there is none.

    `check` raises `UserError` for one that has no place in the run.
    """

    def abstract(meta: Meta) -> TrainState:
        return builder.build(meta.stage_index).step.abstract_state()

    def wanted(meta: Meta) -> bool:
        check(meta)
        # Attempts that were rolled back left checkpoints which no longer belong to the run.
        return meta.stage_step == 0 or meta.attempt >= builder.choose(meta.stage_index)[0].index

    found = store.restore(abstract, wanted)
    if found is None:
        return None
    state, meta = found
    built = builder.build(meta.stage_index)
    return ResumePoint(completed(state, built, builder, meta), meta.stage_index, meta.stage_step, meta)


def reread_stage_start(builder: StageBuilder, store: Store, index: int) -> TrainState:
    """The state with which stage `index` begins, read back: what a rollback needs."""
    built = builder.build(index)
    if index == 0:
        return from_initial_weights(builder, built).state
    step = stage_ends(builder.run)[index - 1]
    if step not in store.steps:
        raise UserError(
            f"{store.directory} has no checkpoint {step}, where stage {built.stage.name} began, so the stage cannot be rolled back"
        )
    before = builder.build(index - 1)
    state = completed(store.read(step, before.step.abstract_state()), before, builder, store.meta(step))
    return continue_into(state, built, builder.run.seed)


def continue_into(state: TrainState, built: BuiltStage, seed: int) -> TrainState:
    """The end of one stage as the beginning of the next: weights on its mesh, optimizer state kept or reset."""
    shapes = [x.shape for x in jax.tree.leaves(state.all_params)]
    params = fit(state.all_params, built, seed, "the weights of the stage before")
    fresh = built.step.state_from_params(params)
    same = shapes == [x.shape for x in jax.tree.leaves(params)]
    opt_state = fresh.opt_state
    if built.stage.keep_optimizer_state:
        if not same:
            warn(f"stages.{built.stage.name}.keep_optimizer_state: parameters changed shape, so the optimizer starts from scratch")
        elif jax.tree.structure(state.opt_state) != jax.tree.structure(opt_state):
            warn(f"stages.{built.stage.name}.keep_optimizer_state: the optimizer is another one, so it starts from scratch")
        else:
            opt_state = jax.device_put(state.opt_state, built.step.state_shardings.opt_state)
    skipped = jax.device_put(state.skipped, built.step.state_shardings.skipped)
    return fresh.replace(opt_state=opt_state, skipped=skipped)


def fit(params: Tree, built: BuiltStage, seed: int, what: str) -> Tree:
    """`params` in the shapes that the stage's specs ask for.

    New leaves (an adapter, or a learned scheme that begins here) get first values, tables that grow with the length keep their rows
    and get first values behind them, leaves that are no longer used are dropped. Raises `UserError` for any other difference.
    """
    wanted, given = dict(paths(built.specs)), dict(paths(params))
    if all(path in given and given[path].shape == spec.shape for path, spec in wanted.items()) and len(wanted) == len(given):
        return params
    other, _ = split(built.specs, lambda path: path not in given or given[path].shape != wanted[path].shape)
    drawn = dict(paths(jax.jit(lambda key: initialize(other, key))(jax.random.key(seed))))
    leaves = []
    for path, spec in wanted.items():
        old, new = given.get(path), drawn.get(path)
        learned = path.startswith("positions/")
        if old is not None and old.shape == spec.shape:
            leaves.append(old)
        elif old is None and (learned or lora.is_adapter(path)):
            leaves.append(new)
        elif old is not None and learned and old.shape[1:] == spec.shape[1:]:
            rows = min(old.shape[0], spec.shape[0])
            leaves.append(jnp.concatenate([old[:rows], new[rows:]]))
        else:
            there = "absent" if old is None else f"of shape {old.shape}"
            raise UserError(f"{what} do not fit the model: {path} is {there} there but {spec.shape} here; use the same model sizes")
    return jax.tree.unflatten(jax.tree.structure(built.specs), leaves)


def _from_other_run(builder: StageBuilder, path: Path) -> ResumePoint:
    """Full state of another run's newest checkpoint, at the same place of this run, which takes over the monitor's decisions."""
    if not path.is_dir():
        raise UserError(f"resume_from={str(path)!r} is not a directory; name another run's workdir")
    other, stages = read_config(path), builder.run.stages

    def check(meta: Meta) -> None:
        if meta.stage_index >= len(stages) or meta.stage_step > stages[meta.stage_index].steps:
            raise UserError(
                f"resume_from={str(path)!r} is at step {meta.stage_step} of stage {meta.stage!r}, which this run does not have"
            )

    if not builder.decisions:
        builder.decisions.extend(metrics.read(path / "decisions.jsonl"))
    with Store.of(path, other, clean=False) as store:
        found = restore_newest(builder, store, check)
    if found is None or found.meta is None:
        raise UserError(f"resume_from={str(path)!r} has no checkpoint; name a workdir in which a run has trained")
    meta, (attempt, schemes) = found.meta, builder.choose(found.index)
    if attempt.watched and 0 < found.stage_step < stages[found.index].steps and meta.probe_before is None:
        raise UserError(
            f"resume_from={str(path)!r} is at step {meta.stage_step} of stage {meta.stage!r}, which no monitor watched from its "
            f"start; set stages.{stages[found.index].name}.monitor=False"
        )
    say(f"resuming from step {meta.step} of {path}")
    if meta.schemes != schemes:
        warn(f"stage {meta.stage} of {path} was trained under other positions than those under which it now goes on")
    return found
