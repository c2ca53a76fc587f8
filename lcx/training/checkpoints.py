"""Checkpoints of a run: written in the background, restored into abstract trees from the newest one that is readable.

Layout of a workdir: `config.json`, `checkpoints/<step>/{params,progress}`, `metrics.jsonl`, `decisions.jsonl`, `tensorboard/`.
`<step>` counts the steps of the whole run. What is not an array (stage, loader position, schemes in force) is in a
checkpoint's custom metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from lcx.adapters import lora
from lcx.adapters.freeze import join, split
from lcx.core import configs
from lcx.core import param_spec as parameters
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.trees import Tree, num_bytes, paths
from lcx.positions.registry import from_config, to_config
from lcx.positions.scheme import Scheme
from lcx.training.stages import CheckpointConfig, RunConfig
from lcx.training.step import TrainState
from lcx.training.workdir import read_config

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Meta:
    """Where in its run a checkpoint was taken, and what a later reader needs to use it.

    `stage_step` is also the loader's state: the next batch of stage `stage_index`. `attempt` counts the monitor's rollbacks of
    the stage. `positions` holds the scheme in force for each layer kind, `length` the declared length. `losses`,
    `probe_before` and `reference` are what the monitor has recorded of the stage so far. `base`: `path` and `fingerprint` of the
    model whose weights the checkpoint lacks because the run does not train them.
    """

    stage: str
    stage_index: int
    attempt: int
    stage_step: int
    step: int
    length: int
    seed: int
    config: str
    positions: dict[str, Any]
    losses: tuple[float, ...] = ()
    probe_before: dict[str, float] | None = None
    reference: dict[str, float] | None = None
    base: dict[str, str] | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """(stage, attempt, step within the stage), which sorts in the order of the run."""
        return self.stage_index, self.attempt, self.stage_step

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layer kind (or `default`) -> scheme in force."""
        return {kind: from_config(values) for kind, values in self.positions.items()}


def scheme_configs(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Schemes as stored in `Meta.positions`."""
    return {kind: to_config(scheme) for kind, scheme in schemes.items()}


class Store:
    """The checkpoints of one workdir. `ends`: steps at which stages end, always kept. Use as a context manager.

    They hold the parameters whose paths `is_kept`. `clean` removes what a killed run left half-written; readers pass False, because
    a run may still be writing it.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        ends: Sequence[int] = (),
        clean: bool = True,
        is_kept: Callable[[str], bool] = lambda _: True,
    ):
        self.is_kept = is_kept
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep_latest), policies.CustomSteps(steps=[0, *ends])]
        if config.keep_every is not None:
            keep.append(policies.EveryNSteps(config.keep_every))
        self.directory = Path(workdir).absolute() / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=clean,
        )
        self._saving: tuple[int, Any] | None = None
        self._silence, self._failures = contextlib.ExitStack(), 0

    @classmethod
    def of(cls, workdir: Path, run: RunConfig) -> "Store":
        """The store that a run writes to."""
        return cls(workdir, run.checkpoint, stage_ends(run), is_kept=run.is_kept)

    def __enter__(self) -> "Store":
        # Errors reach the user as one sentence, which the library's own logs and tracebacks would bury. So would the errors of
        # reads that it abandons after the first failure.
        undo, asyncio = self._silence, logging.getLogger("asyncio")
        undo.callback(absl.logging.set_verbosity, absl.logging.get_verbosity())
        undo.callback(asyncio.setLevel, asyncio.level)
        undo.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        undo.enter_context(warnings.catch_warnings())
        absl.logging.set_verbosity(absl.logging.FATAL)
        asyncio.setLevel(logging.CRITICAL)
        sys.unraisablehook = _without_late_reads
        warnings.filterwarnings("ignore", r"coroutine '\w+\._\w+' was never awaited", RuntimeWarning)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            # The failure has been reported already; closing would raise it again.
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            # After a failure the library's threads may still log, at any time until the process ends, so they stay silenced.
            if kind is not None or self._failures:
                self._silence.pop_all()
            self._silence.close()

    @property
    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, state: TrainState, meta: Meta) -> None:
        """Start writing a checkpoint; the state may be donated as soon as this returns.

        Raises `UserError` when this checkpoint or the one before it does not fit on the disk; earlier ones are untouched.
        """
        self._save({"params": self._kept(state.all_params), "progress": _progress(state)}, meta)

    def save_params(self, params: Tree, meta: Meta) -> None:
        """Like `save`, for weights only: another run can start from them, but none can resume from them."""
        self._save({"params": params}, meta)

    def _save(self, trees: dict[str, Any], meta: Meta) -> None:
        self.wait()
        if meta.step in self.steps:
            return
        self._check_space(trees, meta.step)
        try:
            response = self._checkpointer.save_checkpointables_async(
                meta.step, trees, force=True, custom_metadata=dataclasses.asdict(meta)
            )
        except Exception as error:
            raise self._failed(meta.step, error) from error
        self._saving = (meta.step, response)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete on disk; raises `UserError` when it could not be written."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            if response is not None:
                response.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def meta(self, step: int) -> Meta:
        """The metadata of a checkpoint."""
        values = dict(self._checkpointer.checkpointables_metadata(step).custom_metadata)
        return Meta(**{**values, "losses": tuple(values["losses"])})

    def restore(self, abstract: Callable[[Meta], TrainState], wanted: Callable[[Meta], bool]) -> tuple[TrainState, Meta] | None:
        """State and metadata of the newest readable checkpoint; None when there is no checkpoint.

        `abstract` gives the tree to restore into; checkpoints that `wanted` rejects are deleted. An unreadable one is set
        aside with a warning and the one before it is used; raises `UserError` when none can be read.
        """
        broken: dict[int, Exception] = {}
        for step in reversed(self.steps):
            try:
                meta = self.meta(step)
                found = self.read(step, abstract(meta)) if wanted(meta) else None
            except UserError:
                raise
            except Exception as error:
                broken[step] = error
                continue
            if found is None:
                self._checkpointer.delete(step)
                continue
            for bad, error in broken.items():
                self._set_aside(bad, error, step)
            return found, meta
        if broken:
            step, error = next(iter(broken.items()))
            raise UserError(
                f"no checkpoint in {self.directory} can be read (step {step}: {_short(error)}); "
                f"restore one from a backup, or delete {self.directory} to start over"
            )
        return None

    def read(self, step: int, abstract: TrainState) -> TrainState:
        """The state of one checkpoint, with the shardings of `abstract`; `frozen` lacks what is not kept."""
        trees = {"params": self._kept(abstract.all_params), "progress": _progress(abstract)}
        found = self._load(step, trees)
        trained = {path for path, _ in paths(abstract.params)}
        params, frozen = split(found["params"], lambda path: path in trained)
        return TrainState(params=params, frozen=frozen, **found["progress"])

    def read_params(self, step: int, abstract: Tree) -> Tree:
        """Only the parameters of one checkpoint; without those that are not kept."""
        return self._load(step, {"params": self._kept(abstract)})["params"]

    def _kept(self, params: Tree) -> Tree:
        return split(params, self.is_kept)[0]

    def _load(self, step: int, trees: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, trees)
        except Exception:
            self._failures += 1
            raise

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints after `step`, for a rollback."""
        self.wait()
        for later in [known for known in self.steps if known > step]:
            self._checkpointer.delete(later)

    def _set_aside(self, step: int, error: Exception, used: int) -> None:
        aside = self.directory.parent / f"{FOLDER}.unreadable" / str(step)
        warn(
            f"checkpoint {step} in {self.directory} cannot be read ({_short(error)}); moving it to {aside} and resuming from "
            f"step {used}"
        )
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.directory / str(step), aside)
        self._checkpointer.reload()

    def _check_space(self, trees: Tree, step: int) -> None:
        needed, free = num_bytes(trees) // jax.process_count(), shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"checkpoint {step} needs {needed / 1e6:,.1f} MB but {self.directory} has only {free / 1e6:,.1f} MB left; free "
                f"disk space and rerun the same command; {self._newest()}"
            )

    def _failed(self, step: int, error: Exception) -> UserError:
        self._failures += 1
        self._checkpointer.reload()
        return UserError(
            f"checkpoint {step} could not be written to {self.directory} ({_short(error)}); free disk space or fix the disk and "
            f"rerun the same command; {self._newest()}"
        )

    def _newest(self) -> str:
        return f"it resumes from step {self.steps[-1]}" if self.steps else "it starts over, as there is no earlier checkpoint"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights for evaluation: `params` on their mesh, the run's config, and the schemes and length they were trained with.

    `stop_ids` are tokens at which the model's texts end besides the tokenizer's end-of-sequence token.
    """

    params: Tree
    run: RunConfig
    meta: Meta
    stop_ids: tuple[int, ...] = ()

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layer kind (or `default`) -> scheme in force at the checkpoint."""
        return self.meta.schemes


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from: their `name` in messages, their metadata, and `load(mesh)`, which reads them.

    `fingerprint()` tells them from others, `keep(workdir)` copies into the run's workdir what else of the source will be needed.
    """

    name: str
    meta: Meta
    load: Callable[[Mesh | None], Loaded]
    fingerprint: Callable[[], str]
    keep: Callable[[Path], None] = lambda _: None

    @property
    def base(self) -> dict[str, str]:
        """What `Meta.base` says of them."""
        return {"path": str(Path(self.name).absolute()), "fingerprint": self.fingerprint()}

    def missing(self, there: Meta, wanted: Tree, mesh: Mesh | None) -> Tree:
        """Their parameters at the paths of `wanted`, for a checkpoint that lacks them; raises `UserError` if they have changed."""
        if there.base is not None and there.base["fingerprint"] != self.fingerprint():
            raise UserError(
                f"{self.name} is not the model that the run was started from: its files have changed since; restore them, or start "
                "the run again in another workdir"
            )
        names = {path for path, _ in paths(wanted)}
        return split(self.load(mesh).params, lambda path: path in names)[0]


GetWeights = Callable[[str], InitialWeights]
"""From what `init_from` says to the weights."""


def initial_weights(path: str) -> InitialWeights:
    """The weights of the checkpoint that `init_from` names."""
    meta = load_meta(path)
    digits = configs.fingerprint(meta)
    return InitialWeights(path, meta, lambda mesh: load_params(path, mesh=mesh), lambda: digits)


def load_meta(path: str | Path) -> Meta:
    """The metadata of the newest checkpoint in a workdir, or of a checkpoint folder; reads no arrays."""
    workdir, step = locate(Path(path))
    run = read_config(workdir)
    with Store(workdir, CheckpointConfig(), stage_ends(run), clean=False) as store:
        if not store.steps or step is not None and step not in store.steps:
            raise UserError(f"{path} has no complete checkpoint; train first, or name another workdir")
        return store.meta(store.steps[-1] if step is None else step)


def load_params(
    path: str | Path,
    step: int | None = None,
    stage: str | None = None,
    mesh: Mesh | None = None,
    get_weights: GetWeights = initial_weights,
) -> Loaded:
    """Parameters from a workdir (newest, or at a `step`, or at the end of a `stage`) or from one of its checkpoint folders.

    Placed on `mesh` (default: the first device), adapters folded in. Without a step or stage, the newest readable checkpoint is
    used. What it lacks because the run did not train it is read from `get_weights(run.init_from)`. Raises `UserError` when there
    is no such checkpoint or it cannot be read.
    """
    loaded = load_unfolded(path, step, stage, mesh, get_weights)
    return loaded if loaded.run.adapters is None else dataclasses.replace(loaded, params=lora.fold(loaded.params))


def load_unfolded(
    path: str | Path,
    step: int | None = None,
    stage: str | None = None,
    mesh: Mesh | None = None,
    get_weights: GetWeights = initial_weights,
) -> Loaded:
    """As `load_params`, with adapters beside their kernels."""
    loaded = load_kept(path, step, stage, mesh)
    run, meta = loaded.run, loaded.meta
    if not split(run.specs(meta.schemes, meta.length), run.is_kept)[1]:
        return loaded
    rest = unkept(run, meta, mesh, _base_of(run, meta, get_weights))
    return dataclasses.replace(loaded, params=join(loaded.params, rest))


def load_kept(path: str | Path, step: int | None = None, stage: str | None = None, mesh: Mesh | None = None) -> Loaded:
    """As `load_params`, but only what the checkpoint itself holds: of a run with adapters these, and what it trained in full."""
    asked, (workdir, step) = step, locate(Path(path), step)
    run = read_config(workdir)
    for name, value in (("step", asked), ("stage", stage)):
        if value is not None and step not in (None, asked):
            raise UserError(f"{path} names step {step}, which conflicts with {name}={value}; give only one of them")
    if stage is not None:
        names = [known.name for known in run.stages]
        if stage not in names:
            raise UserError(f"the run in {workdir} has no stage {stage!r}; its stages are {', '.join(names)}")
        step = stage_ends(run)[names.index(stage)]
    with Store(workdir, CheckpointConfig(), stage_ends(run), clean=False, is_kept=run.is_kept) as store:
        if not store.steps:
            raise UserError(f"{store.directory} has no complete checkpoint; train first, or name another workdir")
        if step is not None and step not in store.steps:
            wanted = f"at the end of stage {stage!r} (step {step})" if stage else f"of step {step}"
            raise UserError(f"{store.directory} has no checkpoint {wanted}; its steps are {', '.join(map(str, store.steps))}")
        return _read_newest(store, run, store.steps if step is None else [step], mesh)


def unkept(run: RunConfig, meta: Meta, mesh: Mesh | None, base: InitialWeights) -> Tree:
    """The parameters that a checkpoint of a run lacks: those of the weights that it began with, and the constants of adapters."""
    _, rest = split(run.specs(meta.schemes, meta.length), run.is_kept)
    constants, rest = split(rest, lora.is_constant)
    return join(base.missing(meta, rest, mesh), parameters.initialize(constants, jax.random.key(0)))


def _base_of(run: RunConfig, meta: Meta, get_weights: GetWeights) -> InitialWeights:
    """The weights that a checkpoint of a run lacks because it does not train them."""
    known = None if meta.base is None else meta.base["path"]
    path = known if known is not None and Path(known).exists() else run.init_from
    if not Path(path).exists():
        raise UserError(
            f"{known or path} does not exist, and the run trained only some of its parameters; put that model back, or name "
            "where it is by a link of that name"
        )
    return get_weights(path)


def stage_ends(run: RunConfig) -> list[int]:
    """The run's step count at the end of each stage."""
    total, ends = 0, []
    for stage in run.stages:
        total += stage.steps
        ends.append(total)
    return ends


def abstract_params(run: RunConfig, meta: Meta, mesh: Mesh | None) -> Tree:
    """`ShapeDtypeStruct`s of a checkpoint's parameters on `mesh`, or on the first device."""
    table = run.specs(meta.schemes, meta.length)
    if mesh is not None:
        return parameters.abstract(table, mesh)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), parameters.abstract(table))


def _read_newest(store: Store, run: RunConfig, steps: Sequence[int], mesh: Mesh | None) -> Loaded:
    failures = []
    for step in reversed(steps):
        try:
            meta = store.meta(step)
            loaded = Loaded(store.read_params(step, abstract_params(run, meta, mesh)), run, meta)
        except UserError:
            raise
        except Exception as error:
            failures.append(f"step {step}: {_short(error)}")
            continue
        for failure in failures:
            warn(f"a checkpoint in {store.directory} cannot be read ({failure}); using step {step}")
        return loaded
    raise UserError(f"no checkpoint in {store.directory} can be read ({'; '.join(failures)})")


def locate(path: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The workdir that a path names or lies in, and the step of the checkpoint that it names, else `step`."""
    if not path.is_dir():
        raise UserError(
            f"checkpoint {path} does not exist or is not a directory; name a run's workdir, one of its {FOLDER}/<step>, a "
            "Hugging Face folder or a GGUF file"
        )
    if path.name == FOLDER:
        return path.parent, step
    if path.parent.name == FOLDER and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, step


def _progress(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped, "in_a_row": state.in_a_row}


def _without_late_reads(unraisable: sys.UnraisableHookArgs) -> None:
    """Suppress errors of abandoned reads whose event loop the library has closed; show all others as Python does."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _short(error: BaseException) -> str:
    """The root cause of an error: the outermost message is about the library's internals."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:60]} ... {text[-95:]}"
