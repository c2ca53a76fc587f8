"""DoReMi as two ordinary runs: a reference, and a proxy whose rows are reweighted at every step. The result is a mixture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lcx.core import processes
from lcx.core.batch import Batch
from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.core.trees import Tree
from lcx.recipes import models
from lcx.training import doremi, metrics
from lcx.training.builder import BuiltStage
from lcx.training.doremi import DomainWeights, DoReMiConfig
from lcx.training.ladder import PreviousStage, choose
from lcx.training.loop import train
from lcx.training.meta import scheme_configs
from lcx.training.stages import RunConfig, StageConfig
from lcx.training.step import TrainState
from lcx.training.workdir import make_workdir

LOG, RESULT, SETTINGS = "doremi.jsonl", "mixture.json", "doremi.json"


def find_mixture(
    run: RunConfig, workdir: Path, config: DoReMiConfig, stage: str | None = None, devices: Sequence[jax.Device] | None = None
) -> dict[str, float]:
    """Weights of the parts of a run's mixture by DoReMi, in one of its stages (None: the first), which sum to 1.

    Trains `workdir/reference` on the stage's own weights and `workdir/proxy` on equal ones, each for the stage's steps, and writes
    `workdir/mixture.json`; `workdir/proxy/doremi.jsonl` has a row for each update. The same call resumes. Parts of weight 0 are
    left out. Raises `UserError` for a mixture of one part, for a workdir of other settings, and for whatever a run raises.
    """
    if run.resume_from is not None:
        raise UserError(
            f"resume_from={run.resume_from!r} does not go with DoReMi, whose runs begin anew; give init_from, or neither"
        )
    chosen = next((one for one in run.stages if stage in (None, one.name)), None)
    if chosen is None:
        raise UserError(f"stage {stage!r} is not in the config; its stages are {', '.join(one.name for one in run.stages)}")
    given = models.initial_weights(run.init_from)
    run = from_stage(run, run.stages.index(chosen), None if given is None else PreviousStage(given.meta.schemes, given.meta.length))
    reference = single(run, run.stages[0], equal=False)
    names = sorted(reference.data.parts)
    if len(names) < 2:
        raise UserError(f"stage {chosen.name} trains on {', '.join(names)} alone; DoReMi weighs two parts or more")
    _claim(workdir, {"stage": chosen.name, **dataclasses.asdict(config)})
    say(f"doremi: the reference, in {workdir / 'reference'}")
    trained = train(reference, workdir / "reference", devices, given)
    say(f"doremi: the proxy, in {workdir / 'proxy'}")
    reweight = Reweight(trained.params, config, workdir / "proxy" / LOG)
    train(single(run, run.stages[0], equal=True), workdir / "proxy", devices, given, reweight=reweight)
    processes.meet("doremi")  # the first process has written the last update
    found = metrics.read(workdir / "proxy" / LOG)[-1]["mean"]
    if processes.is_first():
        write_atomically(workdir / RESULT, json.dumps({"stage": chosen.name, "mixture": found}, indent=1) + "\n")
    return found


def _claim(workdir: Path, settings: dict[str, Any]) -> None:
    """Keep the settings in the workdir; raises `UserError` if others are there, whose updates would be mixed with these."""
    path = workdir / SETTINGS
    if path.exists() and (there := json.loads(path.read_text())) != settings:
        raise UserError(f"workdir {workdir} holds a search with {there}, not {settings}; name another --workdir")
    make_workdir(workdir)
    if processes.is_first():
        write_atomically(path, json.dumps(settings) + "\n")


def from_stage(run: RunConfig, index: int, before_first: PreviousStage | None) -> RunConfig:
    """A run that begins with one of its stages, under the schemes that are in force there (`before_first`: of its weights)."""
    if not index:
        return run
    schemes = choose(run, (), index, before_first)[1]
    stage = dataclasses.replace(run.stages[index], positions={})
    return dataclasses.replace(run, positions=scheme_configs(schemes), stages=(stage, *run.stages[index + 1 :]))


def single(run: RunConfig, stage: StageConfig, equal: bool) -> RunConfig:
    """One stage of `run` as a run without the monitor, on its parts that have a weight, each with its own or an `equal` one."""
    data = run.data_of(stage)
    parts = {name: part for name, part in data.parts.items() if part.weight > 0}
    if stage.length == stage.seq_len:  # remapped positions are for other stages
        parts = {name: dataclasses.replace(part, remap="none", pose_chunks=2) for name, part in parts.items()}
    if equal:
        parts = {name: dataclasses.replace(part, weight=1.0) for name, part in parts.items()}
    mixture: dict[str, Any] = {} if equal else {name: weight for name, weight in stage.mixture.items() if name in parts}
    return dataclasses.replace(
        run,
        data=dataclasses.replace(data, parts=parts),
        stages=(dataclasses.replace(stage, mixture=mixture, parts={}, monitor=False, thetas=()),),
        monitor=dataclasses.replace(run.monitor, enabled=False),
    )


class Reweight:
    """Multiplies the loss weights of each step's rows by their part's weight, after that has been updated from the same step.

    `reference` are the parameters of the reference, `log` is where each update is kept, for a run that goes on from any step.
    """

    def __init__(self, reference: Tree, config: DoReMiConfig, log: Path):
        self._reference, self._config, self._log = reference, config, log
        self._weights: DomainWeights | None = None

    def __call__(self, built: BuiltStage, step: int, state: TrainState, batch: Batch) -> Batch:
        """The batch with its loss weights multiplied by α / (share of rows), so that equal weights change nothing."""
        names = built.loader.names
        if self._weights is None:
            self._weights = self._read(names, step)
        with jax.set_mesh(built.mesh):
            excess = doremi.measure(state.all_params, self._reference, built.buffers, batch, built.arch)
        self._weights = doremi.update(self._weights, np.asarray(excess), self._config)
        if processes.is_first():
            metrics.append(self._log, {"stage_step": step + 1, **_record(self._weights, names)})
        factors = (self._weights.now / built.loader.shares).astype(np.float32)
        with jax.set_mesh(built.mesh):
            return _scaled(batch, factors)

    def _read(self, names: Sequence[str], step: int) -> DomainWeights:
        """The weights with which step `step` begins; later rows, of steps that are done again, are cut off."""
        rows = [row for row in metrics.read(self._log) if row["stage_step"] <= step]
        if len(rows) != step:
            raise UserError(
                f"{self._log} has {len(rows)} of the {step} updates before this step; delete its directory to start again"
            )
        processes.meet("doremi")  # all have read what the first process writes again
        if processes.is_first():
            write_atomically(self._log, "".join(json.dumps(row) + "\n" for row in rows))
        if not rows:
            return DomainWeights.uniform(len(names))
        now, excess, mean = (np.asarray([rows[-1][field][name] for name in names]) for field in ("weights", "excess", "mean"))
        return DomainWeights(now, excess, mean, step)


@jax.jit
def _scaled(batch: Batch, factors: jax.Array) -> Batch:
    return batch.replace(loss_weights=batch.loss_weights * factors[batch.row_parts][:, None])


def _record(weights: DomainWeights, names: Sequence[str]) -> dict[str, dict[str, float]]:
    values = {"weights": weights.now, "excess": weights.excess, "mean": weights.mean}
    return {field: dict(zip(names, value.tolist(), strict=True)) for field, value in values.items()}
