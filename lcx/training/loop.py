"""Train a list of stages, from the latest state in the workdir to the end of the last stage."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax

from lcx.core import configs, processes
from lcx.core.batch import Batch
from lcx.core.console import Progress, console, say, warn
from lcx.core.errors import UserError
from lcx.core.numbers import counted
from lcx.core.param_spec import abstract
from lcx.core.trees import Tree, num_elements, paths
from lcx.model.architecture import Architecture
from lcx.positions.scheme import Scheme
from lcx.training import goodput, monitor
from lcx.training import metrics as metrics_log
from lcx.training.builder import BuiltStage, StageBuilder
from lcx.training.checkpoints import Store
from lcx.training.checks import warn_repeats, warn_unusual
from lcx.training.forecast import forecast
from lcx.training.loading import InitialWeights, initial_weights
from lcx.training.memory import check_program
from lcx.training.meta import Meta, scheme_configs
from lcx.training.optimizer import groups
from lcx.training.prefetch import Prefetcher, Stop
from lcx.training.profile import Profiler, ProfileSteps
from lcx.training.resume import ResumePoint, StageHistory, continue_into, history_of, reread_stage_start, resume_point
from lcx.training.slow_steps import SlowSteps
from lcx.training.stages import RunConfig, stage_ends
from lcx.training.step import TrainState
from lcx.training.workdir import check_shared, exclusive, fingerprint, keep_programs, make_workdir, open_workdir
from lcx.training.writers import Writer

Reweight = Callable[[BuiltStage, int, TrainState, Batch], Batch]
"""(stage, its step, the state before it, its batch) -> the batch to train on."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run: final parameters with what is needed to use them, and the monitor's decisions."""

    workdir: Path
    step: int
    params: Tree
    arch: Architecture
    buffers: Tree
    schemes: dict[str, Scheme]
    decisions: tuple[dict[str, Any], ...]


def train(
    run: RunConfig,
    workdir: str | Path,
    devices: Sequence[jax.Device] | None = None,
    given: InitialWeights | None = None,
    profile: ProfileSteps | None = None,
    reweight: Reweight | None = None,
    fewer: str | None = None,
    record: goodput.Recorder | None = None,
) -> Result:
    """Run all stages that are not finished in the workdir; the same call resumes after any interruption.

    `given` are the weights that `run.init_from` names (None: a checkpoint written by lcx, read when needed).
    `profile` are steps to trace; the call raises `UserError` if they are done already. `reweight` gives the batch to train on in
    place of the loader's, of the same shapes. With `fewer`, which is how a user names the number of steps, the time that the run
    will take is said before the first of them. `record` takes down where the time goes (None: one of this call alone).
    Ctrl-C saves and raises `KeyboardInterrupt`, SIGTERM saves and exits with status 143. Raises `UserError` for a config that
    cannot work, a workdir of another run, a full disk, and too many non-finite steps in a row.
    """
    workdir = Path(workdir).absolute()
    decisions = metrics_log.read(workdir / "decisions.jsonl")
    if given is None and run.init_from is not None:
        given = initial_weights(run.init_from)
    builder = StageBuilder(run, decisions, devices, given)
    processes.agree("data", builder.corpus.contents(), "give all hosts the same files, or prepare them once (lcx data prepare)")
    main = jax.process_index() == 0
    if profile is not None:
        profile.check(0, stage_ends(run)[-1])
    make_workdir(workdir)
    with contextlib.ExitStack() as held:
        if main:
            held.enter_context(exclusive(workdir))
        record = held.enter_context(goodput.Recorder()) if record is None else record
        check_shared(workdir)
        open_workdir(workdir, run)
        if main:
            metrics_log.cut_partial_line(workdir / "decisions.jsonl")
        keep_programs(workdir)
        record.become(goodput.PREPARATION)
        if given is not None:
            given.keep(workdir)
        warn_unusual(run)
        for stage, loader in zip(run.stages, builder.loaders, strict=True):
            warn_repeats(stage, loader)
        stop, store = held.enter_context(Stop()), held.enter_context(Store.of(workdir, run))
        profiler = held.enter_context(Profiler(profile, workdir))
        writer = Writer(workdir, run.metrics, main, configs.plain(run))
        try:
            return Trainer(builder, workdir, store, writer, decisions, stop, profiler, record, reweight).run(fewer)
        finally:
            writer.close()


class Trainer:
    """The state of a run in this process; use `train` to run it."""

    def __init__(
        self,
        builder: StageBuilder,
        workdir: Path,
        store: Store,
        writer: Writer,
        decisions: list[dict[str, Any]],
        stop: Stop,
        profiler: Profiler,
        record: goodput.Recorder,
        reweight: Reweight | None = None,
    ):
        self.builder, self.config, self.workdir = builder, builder.run, workdir
        self.store, self.writer, self.decisions, self.stop, self.profiler = store, writer, decisions, stop, profiler
        self.record, self.reweight, self.slow = record, reweight, SlowSteps()
        self.ends = stage_ends(self.config)
        self.config_fingerprint = fingerprint(self.config)
        given, whole = builder.initial, all(self.config.is_kept(path) for path, _ in paths(builder.build(0).specs))
        self.base = None if given is None or whole else given.base

    def run(self, fewer: str | None = None) -> Result:
        """Run all remaining stages; with `fewer` (see `train`), say first what they will take."""
        own = len(self.decisions)
        with self.record.span(goodput.RESTORE if self.store.steps else goodput.PREPARATION):
            start = resume_point(self.builder, self.store)
        for entry in self.decisions[own:]:  # of the run that this one goes on from
            self._keep(entry)
        self.profiler.check(self.ends[start.index] - self.config.stages[start.index].steps + start.stage_step, self.ends[-1])
        # From here on nothing that was asked for is refused: a command that is leaves no trace.
        self.record.keep(self.workdir, active=jax.process_index() == 0)
        self.record.goes_on_from(self.ends[start.index] - self.config.stages[start.index].steps + start.stage_step)
        built, state, at = self.builder.build(start.index), start.state, start.stage_step
        history = history_of(start)
        self.writer.truncate(lambda row: metrics_log.place_of(row) <= self._reached(start))
        self._introduce(built, state)
        if fewer is not None and (start.index, start.stage_step) != (len(self.ends) - 1, self.config.stages[-1].steps):
            processes.meet("metrics")  # they are cut by the first process, and read by all
            rows = metrics_log.read(self.workdir / "metrics.jsonl")
            with self.stop.before_a_step():
                say(forecast(self.builder, start.index, start.stage_step, rows, fewer))
        for index in range(start.index, len(self.config.stages)):
            if index > start.index:
                built = self.builder.build(index)
                state, at, history = continue_into(state, built, self.config.seed), 0, StageHistory()
            state, accepted = self._stage(built, state, at, history)
            while not accepted:
                # Free the memory of the failed attempt before the earlier state is read back.
                del state
                self.store.drop_after(self._stage_start(built))
                self.record.goes_on_from(self._stage_start(built))
                built = self.builder.build(index)
                state, accepted = self._stage(built, reread_stage_start(self.builder, self.store, index), 0, StageHistory())
        with self.record.span(goodput.SAVE):
            self.store.wait()
        # Of what came too late for a step: the evaluation that may follow would not hear of it.
        if number := max(processes.exchange("stop", self.stop.signal or 0)):
            self._leave(self.ends[-1], number)
        say(f"trained {counted(self.ends[-1], 'step')}; metrics and checkpoints in {self.workdir}")
        params = state.all_params
        return Result(self.workdir, self.ends[-1], params, built.arch, built.buffers, built.schemes, tuple(self.decisions))

    def _reached(self, start: ResumePoint) -> tuple[int, int, int]:
        """The place up to which rows of metrics are kept; a finished stage counts as the beginning of the next."""
        stages, index, at = self.config.stages, start.index, start.stage_step
        if at == stages[index].steps and index + 1 < len(stages):
            index, at = index + 1, 0
        return index, self.builder.choose(index)[0].index, at

    def _stage(self, built: BuiltStage, state: TrainState, at: int, history: StageHistory) -> tuple[TrainState, bool]:
        """Run steps `at` to the end of a stage; False with the state when the monitor wants the stage run again from its start."""
        if at == built.stage.steps:
            return state, True
        stage, every = built.stage, self.config.checkpoint.every
        judged = self.config.monitor.steps if built.attempt.watched else None
        if judged is not None and history.before is None:
            with self.record.span(goodput.EVALUATION):
                history.before = self.builder.probe(built, state.all_params)
                history.reference = self.builder.reference(built, state.all_params)
        self.slow = SlowSteps()
        title = stage.name if not built.attempt.index else f"{stage.name} (attempt {built.attempt.index + 1})"
        if built.layout:
            say(f"{title}: layout {built.layout}")
        with (
            self.record.span(goodput.STEP),
            Prefetcher(built.batch, at, stage.steps) as batches,
            Progress(title, stage.steps, at) as bar,
            PendingMetrics(self, built, history, bar) as pending,
        ):
            for step in range(at, stage.steps):
                number = self._stage_start(built) + step + 1
                processes.doing(f"the batch of step {number}")
                with self.record.span(goodput.DATA):
                    batch, waited = batches.next()
                processes.doing(f"step {number} of stage {stage.name}")
                if self.reweight is not None:
                    batch = self.reweight(built, step, state, batch)
                if not built.step.is_compiled_for(batch):
                    bar.note("compiling")
                    with pending.excluded(), self.record.span(goodput.COMPILE), self.stop.before_a_step():
                        program = self.stop.compiled(built.step.lower(state, batch, built.buffers))
                        if program is None:
                            if step > at:
                                pending.flush()
                                self._save(built, state, step, history)
                            self._leave(number - 1, self.stop.signal or signal.SIGINT)
                    check_program(self.config, stage, built.step, built.step.keep(batch, program))
                    processes.meet("compiled")  # the first step's transfers begin within a limit of their library's
                done, total = step + 1, number
                with self.profiler.begin(total, pending.flush):
                    ready = time.perf_counter()
                    state, metrics = built.step(state, batch, built.buffers)
                pending.flush(Pending(step, metrics, waited, ready))
                self.profiler.end(total, pending.flush)
                if done == judged:
                    pending.flush()
                    if self._judge(built, state, history):
                        return state, False
                    self.slow.skip()
                stopping = self.stop.now(built.mesh)
                if stopping is not None or done == stage.steps or (every is not None and total % every == 0):
                    pending.flush()
                    self._save(built, state, done, history)
                if stopping is not None:
                    self._leave(total, stopping)
        return state, True

    def _stage_start(self, built: BuiltStage) -> int:
        return self.ends[built.index] - built.stage.steps

    def _save(self, built: BuiltStage, state: TrainState, done: int, history: StageHistory) -> None:
        meta = Meta(
            stage=built.stage.name,
            stage_index=built.index,
            attempt=built.attempt.index,
            stage_step=done,
            step=self._stage_start(built) + done,
            length=built.stage.length,
            seed=self.config.seed,
            config=self.config_fingerprint,
            positions=scheme_configs(built.schemes),
            losses=tuple(history.losses),
            probe_before=_record(history.before),
            reference=_record(history.reference),
            base=self.base,
        )
        with self.record.span(goodput.SAVE):
            self.store.save(state, meta)
        for one in self.slow.gather():
            self.record.slow_step(one)
            if jax.process_index() == 0 and processes.count() > 1:
                warn(one.sentence)
        self.slow.skip()

    def _judge(self, built: BuiltStage, state: TrainState, history: StageHistory) -> bool:
        """Judge the stage, record and report the decision; True when the run has to return to the stage's start."""
        with self.record.span(goodput.EVALUATION):
            after = self.builder.probe(built, state.all_params)
        decision = monitor.decide(self.config.monitor, history.losses, history.before, after, history.reference)
        entry = {
            "stage": built.stage.name,
            "stage_index": built.index,
            "attempt": built.attempt.index,
            "step": self._stage_start(built) + len(history.losses),
            "theta": built.theta,
            **dataclasses.asdict(decision),
            "probe_before": _record(history.before),
            "probe_after": _record(after),
            "reference": _record(history.reference),
        }
        self.decisions.append(entry)
        following = self.builder.choose(built.index)[0]
        entry["next_theta"] = following.theta
        self._keep(entry)
        theta = "its scheme" if built.theta is None else f"theta {built.theta:.4g}"
        say(f"monitor: {built.stage.name} at {theta}: {decision.verdict} ({decision.reason})")
        if decision.verdict == "straight down":
            return False
        if following.watched:
            say(f"monitor: back to the start of {built.stage.name}, next theta {following.theta:.4g}")
        else:
            scheme = "its scheme as it is" if following.theta is None else f"theta {following.theta:.4g}, whose probe was the best"
            say(f"monitor: no theta is left to try for {built.stage.name}; it goes on with {scheme}")
        return following.index != built.attempt.index

    def _keep(self, decision: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            metrics_log.append(self.workdir / "decisions.jsonl", decision)

    def _leave(self, total: int, number: int) -> NoReturn:
        with self.record.span(goodput.SAVE):
            self.store.wait()
        say(f"saved at step {total}; rerun the same command to resume" if total else "no step is done yet; rerun the same command")
        if processes.count() > 1:
            raise processes.AllStop(128 + number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _introduce(self, built: BuiltStage, state: TrainState) -> None:
        devices = " x ".join(f"{name}={size}" for name, size in built.mesh.shape.items() if size > 1) or "1 device"
        stages = " -> ".join(f"{stage.name} ({stage.seq_len} x {stage.steps})" for stage in self.config.stages)
        trained, count = num_elements(state.params), num_elements(state.all_params)
        share = "" if trained == count else f", {trained:,} of them ({trained / count:.2%}) trained,"
        say(f"{count:,} parameters{share} on {devices}; stages {stages}; workdir {self.workdir}")
        before = None
        for stage in self.config.stages:
            optim = self.config.optim_of(stage)
            plain = self.config.adapters is None and not optim.patterns
            found = groups(optim, self.config.adapters, abstract(built.specs))
            if not plain and found != before:
                say("\n".join(f"{stage.name}: {group}" for group in found))
            before = found


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step of a stage (from 0) that the device works on: its metrics, the seconds waited for its batch, and when this process was
    ready for it (`time.perf_counter()`)."""

    step: int
    metrics: dict[str, jax.Array]
    waited: float
    ready: float


class PendingMetrics:
    """Defers the figures of a step: they are read while the device already works on the next one.

    A thread of its own watches for a step's end: on a GPU the call that starts the next step can return when that one is almost
    done, which is too late to notice.
    """

    def __init__(self, trainer: Trainer, built: BuiltStage, history: StageHistory, bar: Progress):
        self._trainer, self._built, self._history, self._bar = trainer, built, history, bar
        self._pending: tuple[Pending, Future[float]] | None = None
        self._watcher = ThreadPoolExecutor(1, "step-end")
        self._before = time.perf_counter()
        self._plain = not console().is_terminal

    def __enter__(self) -> PendingMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        # Without waiting: after a failure there may be no end of the step to see.
        self._watcher.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leaves the time of a compilation out of the next step's, and reports it."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._before += seconds
        self._bar.note(f"compiled in {seconds:,.0f} s")

    def flush(self, following: Pending | None = None) -> None:
        """Write the pending row, if any; `following` becomes the pending one."""
        pending, self._pending = self._pending, None
        if following is not None:
            self._pending = following, self._watcher.submit(_finish_time, following.metrics)
        if pending is None:
            return
        one, finish = pending
        step, built, trainer = one.step, self._built, self._trainer
        now = finish.result()
        seconds, late, self._before = now - self._before, max(0.0, one.ready - self._before), now
        place = {
            "step": trainer.ends[built.index] - built.stage.steps + step + 1,
            "stage": built.stage.name,
            "stage_index": built.index,
            "attempt": built.attempt.index,
            "stage_step": step + 1,
            "seq_len": built.stage.seq_len,
            "theta": built.theta,
        }
        timing = {**built.meter.speed(seconds), "data_wait": one.waited}
        row = metrics_log.row(place, one.metrics, timing, built.loader.names)
        trainer.writer.write(row)
        trainer.slow.add(row["step"], seconds, late, one.waited)
        trainer.record.step(row["step"])
        if built.attempt.watched and len(self._history.losses) < trainer.config.monitor.steps:
            self._history.losses.append(row["loss"])
        left = f"  {(built.stage.steps - step - 1) * seconds:,.0f} s left" if self._plain else ""
        self._bar.advance(f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s  MFU {row['mfu']:.0%}{left}")
        if not row["ok"]:
            self._report(row, step)

    def _report(self, row: dict[str, Any], step: int) -> None:
        """Report a dropped step and its batch; raises `UserError` after too many in a row."""
        made_of = _few(self._built.loader.provenance(step))
        what = f"step {row['step']} (stage {row['stage']}, batch {step}): loss {row['loss']}, gradient norm {row['grad_norm']}"
        if row["in_a_row"] >= self._trainer.config.max_bad_steps:
            raise UserError(
                f"{what}; this is the last of {row['in_a_row']} non-finite steps in a row, so the run stops: lower optim.lr, or "
                f"inspect the batch, which came from {made_of}"
            )
        warn(f"{what}; parameters are left unchanged. The batch came from {made_of}")


def _finish_time(metrics: dict[str, jax.Array]) -> float:
    """`time.perf_counter()` at the end of the step that has these metrics."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


def _few(lines: Sequence[str], count: int = 3) -> str:
    rest = f"; and {len(lines) - count} more rows" if len(lines) > count else ""
    return "; ".join(lines[:count]) + rest


def _record(probe: monitor.Probe | None) -> dict[str, float] | None:
    return None if probe is None else dataclasses.asdict(probe)
