"""Where rows of metrics go: JSONL always, TensorBoard and Weights & Biases where they are wanted."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lcx.core.console import say
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.files import write_atomically
from lcx.training import metrics
from lcx.training.metrics import MetricsConfig

Row = Mapping[str, Any]

PLACES = ("step", "stage_index", "stage_step", "attempt", "time")
"""Numbers of a row that are no curves."""


class MetricWriter(Protocol):
    """Takes the rows of a run, in order; those behind the step that a run resumes from come again."""

    def truncate(self, keep: Callable[[Row], bool]) -> None:
        """Drop earlier rows that `keep` rejects, where that can be done."""
        ...

    def write(self, row: Row) -> None:
        """Take a row; raises `UserError` when the disk is full."""
        ...

    def close(self) -> None:
        """Write what is still held back."""
        ...


class Jsonl:
    """`metrics.jsonl`: one row a line, flushed; what reports, forecasts and resuming read."""

    def __init__(self, workdir: Path, settings: Row):
        self._path = workdir / "metrics.jsonl"

    def truncate(self, keep: Callable[[Row], bool]) -> None:
        """Drop the rows that `keep` rejects and a last line that a kill has cut short."""
        if self._path.exists():
            kept = [json.dumps(row) for row in metrics.read(self._path) if keep(row)]
            write_atomically(self._path, "".join(line + "\n" for line in kept))

    def write(self, row: Row) -> None:
        """Append the row; raises `UserError` when the disk is full."""
        metrics.append(self._path, row)

    def close(self) -> None:
        """Nothing is held back."""


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, workdir: Path, settings: Row):
        import tensorboardX

        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), flush_secs=30)

    def truncate(self, keep: Callable[[Row], bool]) -> None:
        """Events stay; a reader takes the later of two at one step."""

    def write(self, row: Row) -> None:
        """Add the numbers of the row as scalars."""
        for name, value in curves(row):
            self._events.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


class WandB:
    """A run of Weights & Biases, which its own environment variables govern (WANDB_PROJECT, WANDB_MODE=offline, ...).

    A run that is resumed goes on under the same id, which is kept in `wandb/run_id` of the workdir.
    """

    def __init__(self, workdir: Path, settings: Row):
        wandb = library("wandb", "metrics.writers=wandb", "wandb")
        known = workdir / "wandb" / "run_id"
        if not known.exists():
            write_atomically(known, secrets.token_hex(8))
        quiet = wandb.Settings(console="off", silent=True)
        try:
            self._run = wandb.init(
                dir=str(workdir), name=workdir.name, id=known.read_text(), resume="allow", config=dict(settings), settings=quiet
            )
        except wandb.errors.Error as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases does not start ({why}); log in with wandb login, set WANDB_MODE=offline, or take wandb out of "
                "metrics.writers"
            ) from error
        # Of two rows of one step the later counts; by its own counter a step could not come again.
        self._run.define_metric("*", step_metric="step")
        say(f"Weights & Biases: {self._run.dir if self._run.offline else self._run.url}")

    def truncate(self, keep: Callable[[Row], bool]) -> None:
        """Rows stay; those of steps that are done again follow."""

    def write(self, row: Row) -> None:
        """Log the numbers of the row."""
        self._run.log({"step": row["step"], **{f"train/{name}": value for name, value in curves(row)}})

    def close(self) -> None:
        """Hand over what is still held back; may wait for the network."""
        self._run.finish()


WRITERS: dict[str, Callable[[Path, Row], MetricWriter]] = {"jsonl": Jsonl, "tensorboard": TensorBoard, "wandb": WandB}
"""Name in `metrics.writers` -> writer, made of a workdir and the run's settings."""


class Writer:
    """All the writers that a config names; a process whose `active` is false has none."""

    def __init__(self, workdir: Path, config: MetricsConfig, active: bool = True, settings: Row | None = None):
        self._writers = [WRITERS[name](workdir, settings or {}) for name in config.names] if active else []

    def truncate(self, keep: Callable[[Row], bool]) -> None:
        """Drop the rows that `keep` rejects: the restored run writes them again."""
        for writer in self._writers:
            writer.truncate(keep)

    def write(self, row: Row) -> None:
        """Hand a row to every writer; raises `UserError` when the disk is full."""
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        """Close every writer, also after one has failed to."""
        with contextlib.ExitStack() as last:
            for writer in self._writers:
                last.callback(writer.close)


def curves(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row that make curves, by name; those of parts of the mixture as `NAME/PART`."""
    by_part = {f"{name}/{part}": x for name, found in row.items() if isinstance(found, dict) for part, x in found.items()}
    for name, value in ({**row, **by_part}).items():
        if isinstance(value, int | float) and name not in PLACES:
            yield name, value
