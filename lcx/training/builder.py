"""From a run and the monitor's decisions so far to all that a stage needs: schemes, mesh, compiled step, loader, probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lcx.adapters.lora import is_adapter
from lcx.attention.parallel.balance import choose_balanced
from lcx.attention.parallel.cost import SplitCost
from lcx.core.batch import Batch, SequenceLayout
from lcx.core.chips import chip_of
from lcx.core.errors import UserError
from lcx.core.mesh import axis_size, make_mesh
from lcx.core.trees import Tree
from lcx.data.loader import Corpus, Loader, probe
from lcx.model.architecture import Architecture, build_architecture, build_schemes, row_layout, share_of, windows
from lcx.model.config import ModelConfig
from lcx.model.flops import kernel_entries, step_flops
from lcx.positions.scheme import Scheme
from lcx.training.checks import check_stage, check_vocabulary
from lcx.training.ladder import Attempt, PreviousStage, choose, theta_of
from lcx.training.loading import InitialWeights
from lcx.training.memory import check_least
from lcx.training.metrics import Meter, peak_flops
from lcx.training.monitor import Probe, probe_sums, read_probe
from lcx.training.optimizer import is_trained
from lcx.training.stages import RunConfig, StageConfig
from lcx.training.step import TrainStep, train_step

JUDGED = 8
"""Rows of a stage's first step by which its layout is chosen."""


@dataclasses.dataclass(frozen=True)
class BuiltStage:
    """A stage made ready. `schemes` maps layer kinds (or `default`) to schemes, `buffers` and `specs` follow from them."""

    index: int
    stage: StageConfig
    attempt: Attempt
    schemes: dict[str, Scheme]
    mesh: Mesh
    arch: Architecture
    buffers: Tree
    specs: Tree
    step: TrainStep
    loader: Loader
    meter: Meter
    previous: PreviousStage | None
    layout: str = ""
    """Why rows are dealt to devices by their documents, or not; empty where there is nothing to choose."""

    @property
    def theta(self) -> float | None:
        """The theta in force on the layers that see the whole context."""
        return theta_of(self.schemes)

    def batch(self, step: int) -> Batch:
        """Global arrays of the stage's step `step`."""
        rows, length = self.stage.batch_size, self.stage.seq_len
        own = self.step.local_rows(rows, length)
        share = self.step.share(rows, length, self.loader.documents(step, own) if self.step.balanced else None)
        return self.step.to_device(self.loader.batch(step, share.rows, share.columns), rows, share, length)


class StageBuilder:
    """Builds stages; `decisions`, rows of `decisions.jsonl`, is read for each, so a recorded one is in force from then on."""

    def __init__(
        self,
        run: RunConfig,
        decisions: list[dict[str, Any]],
        devices: Sequence[jax.Device] | None = None,
        initial: InitialWeights | None = None,
    ):
        self.run, self.decisions, self.initial = run, decisions, initial
        self.before_first = None if initial is None else PreviousStage(initial.meta.schemes, initial.meta.length)
        self.devices = list(jax.devices() if devices is None else devices)
        self.meshes = [make_mesh(run.mesh_of(stage), self.devices) for stage in run.stages]
        for index, (stage, mesh) in enumerate(zip(run.stages, self.meshes, strict=True)):
            schemes = self.choose(index)[1]
            check_stage(run, stage, mesh, run.specs(schemes, stage.length))
            # What a scheme refuses at a stage's length is said now, before the workdir is claimed or a stage is trained.
            check_least(run, stage, self._step(index, schemes)[3])
        self.corpus = _corpus(run)
        check_vocabulary(run.model, self.corpus.tokenizer.vocab_size, run.data.tokenizer)
        self.loaders = [self._loader(index, stage) for index, stage in enumerate(run.stages)]
        for index, stage in enumerate(run.stages):
            if run.monitored(stage):
                self._check_probe(index, stage)
        self._layouts: dict[int, tuple[SequenceLayout | None, str]] = {}

    def build(self, index: int) -> BuiltStage:
        """The stage built under the decisions so far."""
        stage, mesh = self.run.stages[index], self.meshes[index]
        attempt, schemes = self.choose(index)
        layout, why = self._layout(index)
        previous = PreviousStage(self.choose(index - 1)[1], self.run.stages[index - 1].length) if index else self.before_first
        arch, buffers, table, step = self._step(index, schemes, layout)
        peak = peak_flops(mesh.devices.flat[0], self.run.metrics.peak_flops) * mesh.size
        return BuiltStage(
            index=index,
            stage=stage,
            attempt=attempt,
            schemes=schemes,
            mesh=mesh,
            arch=arch,
            buffers=buffers,
            specs=table,
            step=step,
            loader=self.loaders[index],
            meter=Meter(
                tokens=stage.batch_size * stage.seq_len,
                flops=_flops(self.run, stage, table),
                peak=peak,
            ),
            previous=previous,
            layout=why,
        )

    def _layout(self, index: int) -> tuple[SequenceLayout | None, str]:
        """The layout of a stage's rows where it follows from their documents, else None; and why."""
        run, stage, mesh = self.run, self.run.stages[index], self.meshes[index]
        plain = row_layout(run.model, run.execution, stage.seq_len, mesh)
        asked, ring = run.execution.context_layout, mesh.shape["ring"]
        if index not in self._layouts:
            found = None, ""
            if asked == "auto" and plain != "striped" and ring > 1 and stage.shifted_group is None:
                rows = self.loaders[index].documents(0)[:JUDGED]
                if any(len(row.lengths) > 1 for row in rows):
                    found = choose_balanced(rows, plain, ring, windows(run.model), _transfer(run.model, stage.seq_len, mesh))
            self._layouts[index] = found
        return self._layouts[index]

    def _step(
        self, index: int, schemes: dict[str, Scheme], layout: SequenceLayout | None = None
    ) -> tuple[Architecture, Tree, Tree, TrainStep]:
        """The architecture of a stage under its schemes, its buffers, its table of parameters and its step, not compiled."""
        run, stage = self.run, self.run.stages[index]
        execution = run.execution if layout != "balanced" else dataclasses.replace(run.execution, context_layout="balanced")
        arch, buffers = build_architecture(
            run.model, execution, build_schemes(run.model, schemes), stage.length, stage.shifted_group
        )
        table = run.specs(schemes, stage.length)
        step = train_step(arch, table, run.optim_of(stage), stage.steps, self.meshes[index], stage.accumulate, run.adapters)
        return arch, buffers, table, step

    def choose(self, index: int) -> tuple[Attempt, dict[str, Scheme]]:
        """The attempt that the decisions call for, and the schemes in force in it."""
        return choose(self.run, self.decisions, index, self.before_first)

    def probe(self, built: BuiltStage, params: Tree) -> Probe:
        """How `params` do on the stage's held-out probe."""
        arch = dataclasses.replace(built.arch, shifted_group=None)
        return self._probe(built, params, arch, built.buffers, built.stage.seq_len)

    def reference(self, built: BuiltStage, params: Tree) -> Probe | None:
        """How they do at the length and with the scheme of the stage before; None in a first stage from scratch."""
        if built.previous is None:
            return None
        schemes, length = build_schemes(self.run.model, built.previous.schemes), built.previous.length
        arch, buffers = build_architecture(self.run.model, self.run.execution, schemes, length)
        seq_len = self.run.stages[built.index - 1].seq_len if built.index else min(length, built.stage.seq_len)
        return self._probe(built, params, arch, buffers, seq_len)

    def _probe(self, built: BuiltStage, params: Tree, arch: Architecture, buffers: Tree, seq_len: int) -> Probe:
        pieces = axis_size(built.mesh, "batch")
        rows = max(2, -(-self.run.monitor.probe_rows // pieces) * pieces)
        own = built.step.local_rows(rows, seq_len)
        held = probe(self.run.data_of(built.stage), seq_len, rows, self.run.seed, self.corpus)
        batch = built.step.to_device(jax.tree.map(lambda x: x[own], held), rows)
        with jax.set_mesh(built.mesh):
            return read_probe(probe_sums(params, buffers, arch, batch))

    def _check_probe(self, index: int, stage: StageConfig) -> None:
        """Raises `UserError` if the rows by which the monitor judges a stage cannot be made: now, not when the stage begins."""
        lengths = {stage.seq_len, self.run.stages[max(0, index - 1)].seq_len}
        try:
            for length in sorted(lengths):
                probe(self.run.data_of(stage), length, 2, self.run.seed, self.corpus)
        except UserError as error:
            reason = str(error).removeprefix("data.parts.probe: ")
            raise UserError(
                f"stages.{stage.name} cannot be watched by the monitor, whose held-out rows cannot be made: {reason}; or set "
                f"stages.{stage.name}.monitor=False"
            ) from error

    def _loader(self, index: int, stage: StageConfig) -> Loader:
        data = self.run.data_of(stage)
        try:
            return Loader(
                data,
                stage.seq_len,
                stage.batch_size,
                self.run.seed,
                index,
                max_position=stage.max_position,
                corpus=self.corpus,
                schedule=self.run.schedule_of(stage),
            )
        except UserError as error:
            raise UserError(f"stages.{stage.name}: {error}") from error


def _transfer(model: ModelConfig, length: int, mesh: Mesh) -> float:
    """Query-key pairs that a device computes while its keys go to the next one; 0 on a host, whose devices share memory."""
    cost = SplitCost(share_of(model, length, mesh.shape), chip_of(mesh.devices.flat[0]))
    return 0.0 if cost.chip.platform == "cpu" else cost.hop * cost.rate


def _flops(run: RunConfig, stage: StageConfig, table: Tree) -> int:
    """Operations of a step of a stage that trains what it trains."""
    optim = run.optim_of(stage)
    frozen = kernel_entries(run.model, table, lambda path: not (is_adapter(path) or is_trained(optim, run.adapters, path)))
    added = kernel_entries(run.model, table, is_adapter)
    return step_flops(run.model, stage.batch_size, stage.seq_len, frozen, added)


def _corpus(run: RunConfig) -> Corpus:
    """One corpus for the sources of all stages."""
    parts = {f"{stage.name}/{name}": part for stage in run.stages for name, part in run.data_of(stage).parts.items()}
    return Corpus(dataclasses.replace(run.data, parts=parts))
