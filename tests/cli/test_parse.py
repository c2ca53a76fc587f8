"""How a command line changes the values of a config."""

from __future__ import annotations

from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from lcx.cli import parse

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"lengths": (1, 2), "name": "a", "part": {"schemes": ("yarn",)}})
"""


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("--config.lengths=", {"lengths": ()}),
        ("--config.part.schemes=", {"part": {"schemes": ()}}),
        ("--config.lengths=3,4", {"lengths": (3, 4)}),
        ("--config.name=", {"name": ""}),
    ],
)
def test_a_tuple_is_emptied_by_nothing_behind_the_equals_sign(tmp_path: Path, word: str, changed: dict) -> None:
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a file", flag_values=values)
    parse.parse(values, "run", [f"--config={file}", word])
    assert values.config.to_dict() == {"lengths": (1, 2), "name": "a", "part": {"schemes": ("yarn",)}, **changed}
