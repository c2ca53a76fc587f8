"""The walk of docs/data.md from a folder of text to a run on a curated mixture, command by command as it is written there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest

from tests.report.html_page import Page

ROOT = Path(__file__).parents[2]
SHELL = f'lcx() {{ "{sys.executable}" -m lcx.cli "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'


def blocks():
    """The commands of the walk, and the config that they use."""
    text = (ROOT / "docs/data.md").read_text().partition("## Curation\n")[2].partition("\n## ")[0]
    commands = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].strip().split("\n")
    return commands, re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_walk_has_six_commands():
    commands, config = blocks()
    assert [command.split(" --")[0] for command in commands] == [
        *("lcx data curate", "python -m webbrowser data/curated/report.html", "lcx data prepare", "lcx data prepare"),
        *("lcx data inspect", "lcx run"),
    ]
    compile(config, "curated.py", "exec")


@pytest.mark.slow
def test_the_walk_as_it_is_written(tmp_path):
    """On texts about Python, with the steps of the quickstart's variant `smoke`."""
    commands, config = blocks()
    (tmp_path / "texts").mkdir()
    for name, text in topics.topics.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "curated.py").write_text(config)
    # A user's machine does not pretend to have the eight devices of the other tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "BROWSER": "true %s"}
    for command in commands:
        line = SHELL + command.replace("--config=curated.py --workdir", "--config=curated.py:smoke --workdir")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    report = json.loads((tmp_path / "data/curated/report.json").read_text())
    assert report["sources"]["books"]["kept"]["documents"] > 20 and report["sources"]["code"]["kept"]["documents"] > 100
    assert "What stays" in Page((tmp_path / "data/curated/report.html").read_text()).sections
    mixture = Page((tmp_path / "data/mixture.html").read_text()).sections["Mixture"].tables[0]
    assert [row[0] for row in mixture[1:]] == ["books", "code", "needles"]
    assert (tmp_path / "runs/curated/report.html").exists()
