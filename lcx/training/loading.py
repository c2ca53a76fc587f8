"""Weights out of checkpoints, for evaluation, generation and export, and for runs that begin with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from lcx.adapters import lora
from lcx.adapters.freeze import join, split
from lcx.core import configs
from lcx.core import param_spec as parameters
from lcx.core.errors import UserError
from lcx.core.quantized import Hold
from lcx.core.trees import Tree, map_paths, paths
from lcx.positions.scheme import Scheme
from lcx.training.checkpoints import FOLDER, Store
from lcx.training.meta import Meta
from lcx.training.stages import CheckpointConfig, RunConfig, stage_ends
from lcx.training.workdir import read_config


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
    """Weights that a run starts from: their `name` in messages, their metadata, and `load(mesh, hold)`, which reads them.

    What `hold`, if there is one, makes of a parameter takes its place. `fingerprint()` tells them from others, `keep(workdir)`
    copies into the run's workdir what else of the source will be needed.
    """

    name: str
    meta: Meta
    load: Callable[[Mesh | None, Hold | None], Loaded]
    fingerprint: Callable[[], str]
    keep: Callable[[Path], None] = lambda _: None

    @property
    def base(self) -> dict[str, str]:
        """What `Meta.base` says of them."""
        return {"path": str(Path(self.name).absolute()), "fingerprint": self.fingerprint()}

    def missing(self, there: Meta, wanted: Tree, mesh: Mesh | None, hold: Hold | None = None) -> Tree:
        """Their parameters at the paths of `wanted`, for a checkpoint that lacks them; raises `UserError` if they have changed."""
        if there.base is not None and there.base["fingerprint"] != self.fingerprint():
            raise UserError(
                f"{self.name} is not the model that the run was started from: its files have changed since; restore them, or start "
                "the run again in another workdir"
            )
        names = {path for path, _ in paths(wanted)}
        return split(self.load(mesh, hold).params, lambda path: path in names)[0]


CHOICES = f"name a run's workdir, one of its {FOLDER}/<step>, a Hugging Face folder or a GGUF file"
"""What a checkpoint may be, as the end of an error sentence."""

GetWeights = Callable[[str], InitialWeights]
"""From what `init_from` says to the weights."""


def initial_weights(path: str) -> InitialWeights:
    """The weights of the checkpoint that `init_from` names."""
    meta = load_meta(path)
    digits = configs.fingerprint(meta)
    return InitialWeights(path, meta, lambda mesh, hold: as_held(load_params(path, mesh=mesh), hold), lambda: digits)


def as_held(loaded: Loaded, hold: Hold | None) -> Loaded:
    """With what `hold` makes of each parameter."""
    return loaded if hold is None else dataclasses.replace(loaded, params=map_paths(hold, loaded.params))


def load_meta(path: str | Path) -> Meta:
    """The metadata of the newest checkpoint in a workdir, or of a checkpoint folder; reads no arrays."""
    workdir, step = locate(Path(path))
    run = config_of(workdir)
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

    Placed on `mesh` (default: the first device), adapters folded in. Without a step or stage, the newest checkpoint is used. What
    it lacks because the run did not train it is read from `get_weights(run.init_from)`. Raises `UserError` when there is no such
    checkpoint, and for one that is damaged.
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
    if len(dict(paths(run.specs(meta.schemes, meta.length)))) == len(dict(paths(loaded.params))):
        return loaded
    rest = missing(run, meta, loaded.params, mesh, _base_of(run, meta, get_weights))
    return dataclasses.replace(loaded, params=join(loaded.params, rest))


def load_kept(path: str | Path, step: int | None = None, stage: str | None = None, mesh: Mesh | None = None) -> Loaded:
    """As `load_params`, but only what the checkpoint itself holds: of a run with adapters these, and what it trained in full."""
    asked, (workdir, step) = step, locate(Path(path), step)
    run = config_of(workdir)
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
        step = store.steps[-1] if step is None else step
        params, meta = store.read_params(step, lambda meta: abstract_params(run, meta, mesh))
        return Loaded(params, run, meta)


def missing(run: RunConfig, meta: Meta, held: Tree, mesh: Mesh | None, base: InitialWeights, hold: Hold | None = None) -> Tree:
    """The parameters that a checkpoint of a run lacks beside those `held`: those of the weights that it began with, and the
    constants of adapters."""
    names = {path for path, _ in paths(held)}
    _, rest = split(run.specs(meta.schemes, meta.length), names.__contains__)
    constants, rest = split(rest, lora.is_constant)
    return join(base.missing(meta, rest, mesh, hold), parameters.initialize(constants, jax.random.key(0)))


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


def abstract_params(run: RunConfig, meta: Meta, mesh: Mesh | None) -> Tree:
    """`ShapeDtypeStruct`s of a checkpoint's parameters on `mesh`, or on the first device."""
    table = run.specs(meta.schemes, meta.length)
    if mesh is not None:
        return parameters.abstract(table, mesh)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), parameters.abstract(table))


def config_of(workdir: Path) -> RunConfig:
    """The config of the run whose checkpoint is asked for; raises `UserError` with all `CHOICES` where there is no run."""
    return read_config(workdir, CHOICES)


def locate(path: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The workdir that a path names or lies in, and the step of the checkpoint that it names, else `step`."""
    if not path.is_dir():
        raise UserError(f"checkpoint {path} {'is not a directory' if path.exists() else 'does not exist'}; {CHOICES}")
    if path.name == FOLDER:
        return path.parent, step
    if path.parent.name == FOLDER and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, step
