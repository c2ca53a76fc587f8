"""The run that the tests of commands look at."""

import pytest

from tests.cli.command import CONFIG, lcx


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run with a checkpoint at the end of each of its two stages."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert lcx(["train", f"--config={CONFIG}", f"--workdir={workdir}"]).returncode == 0
    return workdir
