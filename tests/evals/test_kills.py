"""An evaluation that is killed at ten moments ends with the rows of one that was left alone, and asks nothing twice."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lcx.cli.main import main
from tests.cli import tiny

TASKS, LENGTHS, ITEMS = ("passkey", "many_shot", "needle_in_prose"), (1024, 1536), 6
MOMENTS = ("start", *(i / 9 for i in range(9)))
"""While the program loads, and once so many of all answers are kept."""


def command(workdir):
    program = [sys.executable, "-c", "from lcx.cli.main import main; main()"]
    tasks, lengths = ",".join(TASKS), ",".join(map(str, LENGTHS))
    return [
        *program,
        "eval",
        f"--checkpoint={workdir}",
        f"--tasks={tasks}",
        f"--lengths={lengths}",
        f"--items={ITEMS}",
        "--label=all",
    ]


def kept(workdir):
    path = workdir / "eval" / "answers.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def whole(lines):
    """The answers that were not cut off by a kill."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line)["key"])
    return found


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path):
    unkilled, killed = tmp_path / "alone", tmp_path / "killed"
    main(["train", f"--config={tiny.__file__}", f"--workdir={unkilled}"])
    shutil.copytree(unkilled, killed)
    subprocess.run(command(unkilled), check=True)
    expected = json.loads((unkilled / "eval" / "all.json").read_text())["rows"]
    answers = whole(kept(unkilled))
    assert len(answers) == len(set(answers)) == ITEMS * (5 + 1 + 5) * len(LENGTHS)
    before = []
    for moment in MOMENTS:
        process = subprocess.Popen(command(killed))
        try:
            if moment == "start":
                time.sleep(1)
            while moment != "start" and process.poll() is None and len(kept(killed)) <= moment * len(answers):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        finally:
            process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        now = whole(kept(killed))
        assert now[: len(before)] == before and len(now) == len(set(now))
        before = now
    subprocess.run(command(killed), check=True)
    found = whole(kept(killed))
    assert found[: len(before)] == before and sorted(found) == sorted(answers)
    assert json.loads((killed / "eval" / "all.json").read_text())["rows"] == expected
