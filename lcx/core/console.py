"""Terminal output: lines, tables, a progress bar, and errors in one sentence."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import rich.console
import rich.markup
import rich.progress
import rich.table

from lcx.core import processes
from lcx.core.errors import UserError


def console(stderr: bool = False) -> rich.console.Console:
    """A console on the current standard output, or on standard error."""
    return rich.console.Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(message: str, stderr: bool = False) -> None:
    """Print one line to standard output or standard error; rich markup in `message` is shown literally."""
    console(stderr).print(rich.markup.escape(message))


def warn(message: str) -> None:
    """Print a one-line warning to standard error."""
    console(stderr=True).print(f"[yellow]warning:[/] {rich.markup.escape(message)}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], stderr: bool = False, left: int = 1) -> None:
    """Print a table; cells are shown with `str`, those of the first `left` columns from the left on."""
    grid = rich.table.Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(rich.markup.escape(str(cell)) for cell in row))
    out = console(stderr)
    if not out.is_terminal:
        out.width = 200  # a file or a pipe has no width of its own; folded columns are hard to read and to search
    out.print(grid)


PATIENCE = 30.0
"""Seconds after which a log gets a line from a bar that writes none for its steps."""


class Progress:
    """A progress bar with a line of figures.

    If the output is not a terminal, a plain line every `every` steps; None: one for whatever `note` is told, at most every 30 s.
    `even` says that steps take equally long, so that the bar can tell how much time is left.
    """

    def __init__(self, title: str, total: int, done: int = 0, every: int | None = 20, even: bool = True):
        self._title, self._total, self._done, self._every, self._even = title, total, done, every, even
        self._console = console()
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._spoken = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                *([rich.progress.TimeRemainingColumn(compact=True)] if self._even else []),
                rich.progress.TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """What is being done where no step can be counted, such as compilation."""
        processes.doing(f"{self._title} {self._done}/{self._total}: {text}")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=text)
        elif self._every:
            self._console.print(rich.markup.escape(f"{self._title}: {text}"))
        elif time.monotonic() - self._spoken >= PATIENCE:
            self._spoken = time.monotonic()
            self._console.print(rich.markup.escape(f"{self._title} {self._done}/{self._total}: {text}"))

    def advance(self, figures: str = "", steps: int = 1) -> None:
        """Record `steps` more completed steps, with `figures` to show next to the bar."""
        before, self._done = self._done, self._done + steps
        processes.doing(f"{self._title} {self._done}/{self._total} done")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, figures=figures)
        elif self._every and (self._done // self._every > before // self._every or self._done == self._total):
            self._console.print(rich.markup.escape(f"{self._title} {self._done}/{self._total} {figures}"))


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn `UserError` and system errors into one sentence on standard error and exit status 1, an interrupt into status 130."""
    try:
        yield
    except UserError as error:
        print_error(str(error))
        sys.exit(1)
    except BrokenPipeError:
        # Whoever reads our output has closed it, as `| head` does; nothing is wrong. Keep the interpreter's last flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError as error:
        print_error(f"out of memory ({error or 'no details'}); use shorter or fewer rows, or a larger machine")
        sys.exit(1)
    except OSError as error:
        if error.strerror is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print_error(f"operating system error {error.strerror!r}{where}; everything saved before is intact")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def print_error(sentence: str) -> None:
    """Print an error's sentence to standard error."""
    console(stderr=True).print(f"[red]error:[/] {rich.markup.escape(sentence)}")
