"""How deep a kernel's tile lies below the command: the frames of lcx between `lcx train` and the first tile of the forward pass.

`python -m tests.frames` prints them, from a traceback of a real run.
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp

import lcx
from lcx.attention import blockwise
from lcx.cli.main import main

ROOT = Path(lcx.__file__).parent
CONFIG = Path(__file__).parent / "cli" / "tiny.py"

MOST_FRAMES, MOST_FILES = 20, 10


class Frame(NamedTuple):
    """A call on the stack: its file below `lcx/`, the line, and the function."""

    file: str
    line: int | None
    function: str


class Reached(Exception):
    """The tile has been reached; nothing needs to be trained."""


def frames(workdir: Path) -> list[Frame]:
    """The frames of lcx above the first tile that the blockwise kernel computes in a training step, outermost first, and its own.

    The run begins in `workdir` and is given up at the tile.
    """
    stack: list[traceback.FrameSummary] = []
    exp = jnp.exp

    def recording(*args: Any) -> Any:
        above = traceback.extract_stack()[:-1]
        if above[-1].filename != blockwise.__file__:
            return exp(*args)
        stack.extend(above)
        raise Reached

    # A tile cannot do without an exponential, whatever its functions are called.
    chosen = ["--config.execution.attention=blockwise", "--config.model.num_layers=2"]
    with mock.patch.object(jnp, "exp", recording), contextlib.suppress(Reached):
        main(["train", f"--config={CONFIG}", f"--workdir={workdir}", *chosen])
    return [
        Frame(str(Path(frame.filename).relative_to(ROOT)), frame.lineno, frame.name)
        for frame in stack
        if Path(frame.filename).is_relative_to(ROOT)
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        stack = frames(Path(made))
    for number, frame in enumerate(stack, 1):
        print(f"{number:3}  {frame.file}:{frame.line}  {frame.function}")
    print(f"{len(stack)} frames in {len({frame.file for frame in stack})} files; at most {MOST_FRAMES} in {MOST_FILES}")
