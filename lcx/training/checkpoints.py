"""Checkpoints of a run: written in the background, restored into abstract trees from the newest one that is readable.

Layout of a workdir: `config.json`, `checkpoints/<step>/{params,progress}`, `metrics.jsonl`, `decisions.jsonl`, `tensorboard/`.
`<step>` counts the steps of the whole run. What is not an array (stage, loader position, schemes in force) is in a
checkpoint's custom metadata, with the checksum of every array and one of all this; each part has a manifest of its files. It is all
there before the checkpoint counts, and compared whenever arrays are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import absl.logging
import jax
from orbax.checkpoint import v1 as ocp

from lcx.adapters.freeze import split
from lcx.core import processes
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.manifest import DamagedError
from lcx.core.trees import Tree, num_bytes, paths
from lcx.training import checked
from lcx.training.checked import PARAMS, PROGRESS, Examined, short
from lcx.training.meta import Meta
from lcx.training.stages import CheckpointConfig, RunConfig, stage_ends
from lcx.training.step import TrainState

T = TypeVar("T")

FOLDER = "checkpoints"


class Store:
    """The checkpoints of one workdir. `ends`: steps at which stages end, always kept. Use as a context manager.

    They hold the parameters whose paths `is_kept`. `clean` removes what a killed run left half-written; readers pass False, because
    a run may still be writing it, and leave everything else as it is, too. Without `with_checksums` nothing gets a checksum, to
    measure what they cost.
    """

    def __init__(
        self,
        workdir: Path,
        config: CheckpointConfig,
        ends: Sequence[int] = (),
        clean: bool = True,
        is_kept: Callable[[str], bool] = lambda _: True,
        with_checksums: bool = True,
    ):
        self.is_kept, self._checked, self._reads = is_kept, with_checksums, not clean
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep_latest), policies.CustomSteps(steps=[0, *ends])]
        if config.keep_every is not None:
            keep.append(policies.EveryNSteps(config.keep_every))
        self.directory = Path(workdir).absolute() / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            context=checked.context((PARAMS, PROGRESS)) if with_checksums else None,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=clean,
        )
        self._saving: tuple[int, Any] | None = None
        self._silence, self._failures = contextlib.ExitStack(), 0

    @classmethod
    def of(cls, workdir: Path, run: RunConfig, clean: bool = True) -> "Store":
        """The store that a run writes to, or with `clean` False one to read it."""
        return cls(workdir, run.checkpoint, stage_ends(run), clean, run.is_kept)

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
        warnings.filterwarnings("ignore", r"coroutine '[\w.]+' was never awaited", RuntimeWarning)
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
        self._save({PARAMS: split(state.all_params, self.is_kept)[0], PROGRESS: _progress(state)}, meta)

    def save_params(self, params: Tree, meta: Meta) -> None:
        """Like `save`, for weights only: another run can start from them, but none can resume from them."""
        self._save({PARAMS: params}, meta)

    def _save(self, trees: dict[str, Any], meta: Meta) -> None:
        self.wait()
        if meta.step in self.steps:
            return
        self._check_space(trees, meta.step)
        # Before anything is written: the buffers may be given away as soon as this returns.
        values, parts = checked.sealed(meta, trees) if self._checked else (dataclasses.asdict(meta), trees)
        try:
            response = self._checkpointer.save_checkpointables_async(meta.step, parts, force=True, custom_metadata=values)
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
        """The metadata of a checkpoint; raises `UserError` if they are not those that were written."""
        return self._whole(step, lambda: self._meta(step))

    def _meta(self, step: int) -> Meta:
        return checked.record(self._checkpointer, step).meta

    def restore(self, abstract: Callable[[Meta], TrainState], wanted: Callable[[Meta], bool]) -> tuple[TrainState, Meta] | None:
        """State and metadata of the newest checkpoint that is whole; None when there is no checkpoint.

        `abstract` gives the tree to restore into; checkpoints that `wanted` rejects are deleted. A damaged one is set aside with a
        warning and the one before it is used; raises `UserError` when none can be read. A reader only passes over either.
        """
        broken: dict[int, Exception] = {}
        for step in reversed(self.steps):
            found, error = self._attempt(lambda step=step: self._wanted(step, abstract, wanted))
            if error is not None:
                broken[step] = error
                continue
            if found is None:
                if not self._reads:
                    self._checkpointer.delete(step)
                continue
            for bad, error in broken.items():
                self._set_aside(bad, error, step)
            return found
        if broken:
            step, error = next(iter(broken.items()))
            way = "name another run" if self._reads else f"delete {self.directory} to start over"
            raise UserError(
                f"no checkpoint in {self.directory} can be read (step {step}: {short(error)}); restore one from a backup, or {way}"
            )
        return None

    def _wanted(
        self, step: int, abstract: Callable[[Meta], TrainState], wanted: Callable[[Meta], bool]
    ) -> tuple[TrainState, Meta] | None:
        meta = self._meta(step)
        return (self._read(step, abstract(meta)), meta) if wanted(meta) else None

    def _whole(self, step: int, read: Callable[[], T]) -> T:
        """What `read` gives; raises `UserError` for a checkpoint that is damaged or cannot be read."""
        found, error = self._attempt(read)
        if error is not None:
            others = [str(other) for other in self.steps if other != step]
            way = f"name another of its steps ({', '.join(others)})" if others else "put back a whole copy"
            raise UserError(f"checkpoint {step} in {self.directory} is damaged: {short(error)}; {way}")
        return cast(T, found)

    def _attempt(self, read: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """What `read` gives, or what is wrong with the checkpoint: for all processes if it is for one."""
        found, error = None, None
        try:
            found = read()
        except Exception as caught:
            if isinstance(caught, UserError) and not isinstance(caught, DamagedError):
                raise
            error = caught
        told = [text for text in processes.exchange("checkpoint is damaged", None if error is None else short(error)) if text]
        error = error or (DamagedError(told[0]) if told else None)
        return (None if error is not None else found), error

    def read(self, step: int, abstract: TrainState) -> TrainState:
        """The state of one checkpoint, with the shardings of `abstract`; `frozen` lacks what is not kept.

        Raises `UserError` if an array or a file of it is not what was written.
        """
        return self._whole(step, lambda: self._read(step, abstract))

    def _read(self, step: int, abstract: TrainState) -> TrainState:
        trees = {PARAMS: self._held(step, abstract.all_params), PROGRESS: _progress(abstract)}
        found = self._load(step, trees)
        trained = {path for path, _ in paths(abstract.params)}
        params, frozen = split(found[PARAMS], lambda path: path in trained)
        return TrainState(params=params, frozen=frozen, **found[PROGRESS])

    def read_params(self, step: int, abstract: Callable[[Meta], Tree]) -> tuple[Tree, Meta]:
        """Only the parameters of one checkpoint, without those that are not kept, and its metadata; raises as `read` does."""

        def read() -> tuple[Tree, Meta]:
            meta = self._meta(step)
            return self._load(step, {PARAMS: self._held(step, abstract(meta))})[PARAMS], meta

        return self._whole(step, read)

    def _held(self, step: int, params: Tree) -> Tree:
        """Those of the parameters that a checkpoint holds: a run to which stages were added may by now keep more."""
        names = checked.names(self._checkpointer, step, PARAMS)
        return split(params, self.is_kept if names is None else names.__contains__)[0]

    def _load(self, step: int, trees: dict[str, Any]) -> dict[str, Any]:
        try:
            return checked.load(self._checkpointer, step, trees)
        except Exception:
            self._failures += 1
            raise

    def examine(self, step: int) -> Examined:
        """What is wrong with a checkpoint: see `checked.examine`."""
        return checked.examine(self._checkpointer, step)

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints after `step`, for a rollback."""
        self.wait()
        for later in [known for known in self.steps if known > step]:
            self._checkpointer.delete(later)

    def _set_aside(self, step: int, error: Exception, used: int) -> None:
        damaged = f"checkpoint {step} in {self.directory} is damaged ({short(error)})"
        if self._reads:
            warn(f"{damaged}; resuming from step {used}")
            return
        aside = self.directory.parent / f"{FOLDER}.unreadable" / str(step)
        warn(f"{damaged}; moving it to {aside} and resuming from step {used}")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.directory / str(step), aside)
        processes.meet("a checkpoint is set aside")
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
            f"checkpoint {step} could not be written to {self.directory} ({short(error)}); free disk space or fix the disk and "
            f"rerun the same command; {self._newest()}"
        )

    def _newest(self) -> str:
        return f"it resumes from step {self.steps[-1]}" if self.steps else "it starts over, as there is no earlier checkpoint"


def _progress(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped, "in_a_row": state.in_a_row}


def _without_late_reads(unraisable: sys.UnraisableHookArgs) -> None:
    """Suppress errors of reads that the library has abandoned; show all others as Python does."""
    if not str(unraisable.exc_value).startswith(("Event loop is closed", "Encountered error while reading array index")):
        sys.__unraisablehook__(unraisable)
