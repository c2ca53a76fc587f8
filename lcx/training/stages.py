"""What a run is: a list of stages over one model, and the checks that are worth making before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from lcx.adapters import lora
from lcx.adapters.lora import LoraConfig
from lcx.core import configs
from lcx.core.configs import not_negative, positive
from lcx.core.errors import UserError
from lcx.core.mesh import MeshConfig
from lcx.core.trees import Tree
from lcx.data import schedule
from lcx.data.config import DataConfig
from lcx.model import params
from lcx.model.architecture import build_schemes
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig, refuse_moved
from lcx.positions.derive import extend, with_theta
from lcx.positions.registry import from_config
from lcx.positions.scheme import Scheme
from lcx.training.metrics import MetricsConfig
from lcx.training.monitor import MonitorConfig
from lcx.training.optimizer import OptimConfig, is_trained


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    `every` steps (None: only at the ends of stages), the newest `keep_latest`, and all at multiples of `keep_every`. Ends of
    stages are always kept: evaluation and the next stage start from them.
    """

    every: int | None = 100
    keep_latest: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        positive("checkpoint", every=self.every, keep_latest=self.keep_latest, keep_every=self.keep_every)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stretch of a run at one length, from the weights that the stage before left.

    `seq_len` tokens a row, `batch_size` rows a step in `accumulate` microbatches, `steps` steps. `max_position` is the declared
    length (default `seq_len`). `positions` changes the scheme from here on, per layer kind: a number is a new theta, a text or
    mapping another scheme, which keeps the theta it does not name. `mixture` sets weights of data parts by name: a number, or knots
    (place, weight) between which the weight runs straight, with places from 0 to 1 as shares of the stage's steps, or from 0 to
    its number of tokens. `parts` changes any of their fields, `optim` fields of the optimizer, for this stage.
    `keep_optimizer_state` carries AdamW's moments over. `mesh` replaces the run's. `monitor` switches the early monitor on or off
    (None: as the run says); `thetas` is the ladder that it tries (empty: around the critical base). `shifted_group`: train with
    attention within groups of so many tokens, shifted by half a group in half of the heads (LongLoRA, which takes a quarter of
    `seq_len`); probes and evaluations see whole rows.
    """

    name: str
    seq_len: int
    steps: int
    batch_size: int
    accumulate: int = 1
    max_position: int | None = None
    positions: dict[str, Any] = dataclasses.field(default_factory=dict)
    mixture: dict[str, float | schedule.Knots] = dataclasses.field(default_factory=dict)
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    optim: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep_optimizer_state: bool = False
    mesh: MeshConfig | None = None
    monitor: bool | None = None
    thetas: tuple[float, ...] = ()
    shifted_group: int | None = None

    def __post_init__(self) -> None:
        sizes = ("seq_len", "steps", "batch_size", "accumulate", "max_position")
        positive(f"stages.{self.name}", **{name: getattr(self, name) for name in sizes})
        for theta in self.thetas:
            positive(f"stages.{self.name}.thetas", theta=theta)
        if self.shifted_group is not None and not (2 <= self.shifted_group <= self.seq_len and self.shifted_group % 2 == 0):
            raise UserError(
                f"stages.{self.name}.shifted_group={self.shifted_group} must be an even number of at most seq_len={self.seq_len} "
                f"tokens; a quarter is {max(2, self.seq_len // 8 * 2)}"
            )
        if self.max_position is not None and self.max_position < self.seq_len:
            raise UserError(f"stages.{self.name}.max_position={self.max_position} is below seq_len={self.seq_len}")
        if self.length > 2**31 - 1:
            raise UserError(
                f"stages.{self.name}: {self.length:,} positions exceed the number of int32 positions; give at most {2**31 - 1:,}"
            )
        if self.batch_size % self.accumulate:
            divisors = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise UserError(
                f"stages.{self.name}.batch_size={self.batch_size} must be divisible by accumulate={self.accumulate}; "
                f"its divisors are {divisors}"
            )
        for part, weight in self.mixture.items():
            if isinstance(weight, int | float):
                not_negative(f"stages.{self.name}.mixture", **{part: weight})
        self.changing_weights()  # wrong ones are answered here

    @property
    def length(self) -> int:
        """The declared length, in tokens."""
        return self.max_position or self.seq_len

    @property
    def tokens(self) -> int:
        """Places of tokens in the stage's rows; those with padding count."""
        return self.steps * self.batch_size * self.seq_len

    def changing_weights(self) -> dict[str, schedule.Knots]:
        """The knots of `mixture`, by part, with places as shares of the steps; raises `UserError` for those that do not fit."""
        return {
            part: schedule.over_stage(f"stages.{self.name}.mixture.{part}", weight, self.tokens)
            for part, weight in self.mixture.items()
            if not isinstance(weight, int | float)
        }


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    `lora` trains adapters and leaves the weights of `init_from` as they are. `init_from`: a model whose weights to start from.
    `init_noise`: deviation of normal noise on those of them that are trained, as a share of the root mean square of each array.
    `resume_from`: another run's workdir to go on from, with optimizer and step. `max_bad_steps`: non-finite steps in a row after
    which the run stops.
    """

    model: ModelConfig
    stages: tuple[StageConfig, ...]
    execution: ExecutionConfig = ExecutionConfig()
    positions: dict[str, Any] = dataclasses.field(default_factory=lambda: {"default": {"name": "rope", "theta": 10000.0}})
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    seed: int = 0
    init_from: str | None = None
    init_noise: float = 0.0
    resume_from: str | None = None
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        positive("config", max_bad_steps=self.max_bad_steps)
        not_negative("config", init_noise=self.init_noise)
        if self.init_noise and self.init_from is None:
            raise UserError(f"init_noise={self.init_noise} is for the weights of a model that exists; name it with init_from")
        if self.init_noise and self.adapters is not None:
            raise UserError(
                f"init_noise={self.init_noise} has no effect on a model below adapters, which stays as it is; set init_noise=0, or "
                "lora.rank=None to train the model itself"
            )
        if self.seed < 0:
            raise UserError(f"config.seed={self.seed} must not be negative")
        if self.adapters is not None and self.init_from is None:
            raise UserError("lora.rank is for adapters of a model that exists; name it with init_from, or set lora.rank=None")
        if not self.stages:
            raise UserError("stages is empty; define at least one stage with seq_len, steps and batch_size")
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"stages has {name!r} twice; stage names must differ")
            if not name or set(name) & set("/\\ "):
                raise UserError(f"stage name {name!r} is invalid; names may hold neither blanks nor slashes")
        mixtures = []
        for stage in self.stages:  # wrong overrides are answered here, not when their stage begins
            self.optim_of(stage)
            mixtures.append(self.data_of(stage))
            if stage.thetas and not self.monitored(stage):
                raise UserError(
                    f"stages.{stage.name}.thetas are what the monitor may try, but it does not watch the stage; set "
                    f"monitor.enabled=True, or give the theta as stages.{stage.name}.positions"
                )
            if self.monitored(stage) and self.monitor.steps >= stage.steps:
                raise UserError(
                    f"stages.{stage.name}.steps={stage.steps} must exceed the monitor's {self.monitor.steps} steps; "
                    f"lower monitor.steps or set stages.{stage.name}.monitor=False"
                )
        self._check_remapped(mixtures)

    def _check_remapped(self, mixtures: list[DataConfig]) -> None:
        """Raises `UserError` for a part whose positions are to be remapped, but are as long as its rows in all stages.

        `mixtures` are those of the stages.
        """
        remapped = {name: part.remap for data in mixtures for name, part in data.parts.items() if part.remap != "none"}
        for stage, data in zip(self.stages, mixtures, strict=True):
            if stage.length > stage.seq_len:
                remapped = {name: remap for name, remap in remapped.items() if name not in data.parts}
        if remapped:
            name, remap = next(iter(remapped.items()))
            raise UserError(
                f"data.parts.{name}.remap={remap!r} changes no position, as max_position exceeds seq_len in no stage; set "
                "stages.STAGE.max_position, or leave remap out"
            )

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that the run trains; None if it trains its model's own parameters."""
        return None if self.lora.rank is None else self.lora

    def optim_of(self, stage: StageConfig) -> OptimConfig:
        """The optimizer of a stage: the run's with the stage's changes."""
        try:
            optim = configs.build(OptimConfig, {**configs.plain(self.optim), **stage.optim}, f"stages.{stage.name}.optim")
            return dataclasses.replace(optim, lr_scale=(*optim.lr_scale, *self.lora.lr_scale))
        except UserError as error:
            where = f"stages.{stage.name}."
            raise UserError(str(error) if where in str(error) else f"{where}{error}") from error

    def specs(self, schemes: Mapping[str, Scheme], length: int) -> Tree:
        """The table of parameters, adapters included, under schemes by layer kind (or `default`) and a declared length."""
        table = params.specs(self.model, build_schemes(self.model, schemes), length)
        return table if self.adapters is None else lora.specs(table, self.adapters, self.model.tied_embeddings)

    def is_kept(self, path: str) -> bool:
        """Whether checkpoints hold the parameter at a path: not if it is and remains what `init_from` has."""
        if self.init_from is None or path.startswith("positions/"):
            return True
        return any(is_trained(self.optim_of(stage), self.adapters, path) for stage in self.stages)

    def data_of(self, stage: StageConfig) -> DataConfig:
        """The mixture of a stage: the run's with the stage's weights (averages of those that change) and changed parts."""
        if not stage.mixture and not stage.parts:
            return self.data
        values = configs.plain(self.data)
        changing = stage.changing_weights()
        for name, weight in stage.mixture.items():
            configs.choice(f"stages.{stage.name}.mixture", name, [*values["parts"], *stage.parts])
            values["parts"].setdefault(name, {})["weight"] = schedule.mean(changing[name]) if name in changing else weight
        return configs.build(DataConfig, _merge(values, {"parts": stage.parts}), f"stages.{stage.name}.data")

    def schedule_of(self, stage: StageConfig) -> schedule.Schedule | None:
        """The weights that change within a stage; None if all are constant."""
        changing = {part: knots for part, knots in stage.changing_weights().items() if not schedule.is_constant(knots)}
        return schedule.Schedule(stage.steps, changing) if changing else None

    def mesh_of(self, stage: StageConfig) -> MeshConfig:
        """The mesh of a stage."""
        return self.mesh if stage.mesh is None else stage.mesh

    @property
    def evaluation_mesh(self) -> MeshConfig:
        """The mesh of the stage with the longest rows, which evaluations at their length need, too."""
        return self.mesh_of(max(self.stages, key=lambda stage: stage.seq_len))

    def monitored(self, stage: StageConfig) -> bool:
        """Does the early monitor watch this stage? Not a first one from scratch, unless asked to: there is nothing to compare."""
        if stage.monitor is not None:
            return stage.monitor
        scratch = stage == self.stages[0] and self.init_from is None
        return self.monitor.enabled and (not scratch or bool(stage.thetas))


def run_config(values: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """A `RunConfig` from a `ConfigDict` or nested mapping.

    `stages` is a list of mappings with a `name`, or a mapping of name to stage, which flags reach
    (`--config.stages.extend.steps=10`). A `ConfigDict` sorts its keys, so the order of a mapping's stages is that of
    `stage_order` (a list of names) where given, else by `seq_len`, then by name.
    """
    values = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values)
    if isinstance(model := values.get("model"), Mapping | ml_collections.ConfigDict):
        refuse_moved(*(f"config.model.{name}" for name in model))
    order = values.pop("stage_order", None)
    stages = values.get("stages")
    if isinstance(stages, Mapping):
        values["stages"] = _in_order(stages, list(order) if order else None)
    elif order:
        raise UserError("stage_order applies to stages given by name; a list of stages has an order already")
    return configs.build(RunConfig, values)


def _in_order(stages: Mapping[str, Any], order: list[str] | None) -> list[StageConfig]:
    built = {}
    for name, stage in stages.items():
        if not isinstance(stage, Mapping | ml_collections.ConfigDict):
            raise UserError(f"config.stages.{name}={stage!r} must be a mapping with seq_len, steps and batch_size")
        built[name] = configs.build(StageConfig, {"name": name, **dict(stage.items())}, f"config.stages.{name}")
    if order is None:
        return sorted(built.values(), key=lambda stage: (stage.seq_len, stage.name))
    for name in order:
        if "," in name:
            raise UserError(
                f"config.stage_order={name!r} is a single name; give a list, as in --config.stage_order=\"('base','longer')\""
            )
        configs.choice("config.stage_order", name, built)
    if left := sorted(set(built) - set(order)):
        raise UserError(f"config.stage_order={order} leaves out {', '.join(left)}; list every stage, or delete it from stages")
    return [built[name] for name in order]


def stage_ends(run: RunConfig) -> list[int]:
    """The run's step count at the end of each stage."""
    total, ends = 0, []
    for stage in run.stages:
        total += stage.steps
        ends.append(total)
    return ends


def override(current: Mapping[str, Scheme], stage: StageConfig, trained_length: int | None) -> dict[str, Scheme]:
    """`current` (kind or `default` -> scheme) with the stage's changes; what a change does not name stays as it was.

    `trained_length` is that of the weights; None for those that are not trained, which begin at the stage's.
    """
    changed = dict(current)
    for kind, spec in stage.positions.items():
        before = current.get(kind, current.get("default"))
        path = f"stages.{stage.name}.positions.{kind}"
        if isinstance(spec, bool) or not isinstance(spec, int | float | str | Mapping | ml_collections.ConfigDict):
            raise UserError(f"{path}={spec!r} must be a theta, a text like 'yarn:factor=4' or a mapping")
        if before is None:
            changed[kind] = from_config(spec, path)
            continue
        if isinstance(spec, int | float):
            changed[kind] = with_theta(before, float(spec))
            continue
        if not isinstance(spec, str) and "name" not in spec:
            spec = {"name": before.name, **spec}
        # A scheme of the same name keeps all its settings, another keeps what it shares with the one before.
        if not isinstance(spec, str) and spec["name"] == before.name:
            spec = {**_settings(before), **spec}
        changed[kind] = extend(before, spec, trained_length or before.trained_length or stage.length)
    return changed


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {field.name: getattr(scheme, field.name) for field in dataclasses.fields(scheme)}


def _merge(base: Any, changes: Mapping[str, Any]) -> Any:
    merged = dict(base)
    for key, value in changes.items():
        inner = isinstance(value, Mapping | ml_collections.ConfigDict) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], dict(value.items())) if inner else value
    return merged
