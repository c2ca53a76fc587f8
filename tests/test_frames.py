"""From the command to a kernel's tile is a short way."""

from tests.frames import MOST_FILES, MOST_FRAMES, frames


def test_the_way_from_the_command_to_a_tile_is_short(tmp_path):
    stack = frames(tmp_path)
    assert stack[0].file == "cli/main.py" and stack[-1].file == "attention/blockwise.py"
    assert len(stack) <= MOST_FRAMES and len({frame.file for frame in stack}) <= MOST_FILES, stack
