"""Processes on this machine: told apart, ended together, their status passed on."""

import os
import signal
import sys
import threading
import time

import pytest

from lcx.core.errors import UserError
from lcx.launch import local
from lcx.launch.job import JobSpec
from lcx.launch.local import Processes, commands, run_all

PYTHON = [sys.executable, "-S", "-c"]


def test_each_process_is_told_who_it_is():
    found = commands(JobSpec("a", ("run", "--config=x")), Processes(2, 4), 8476)
    assert found[1] == [
        *(sys.executable, "-m", "lcx.cli", "run", "--config=x", "--host_devices=4"),
        *("--distributed=127.0.0.1:8476", "--num_processes=2", "--process_id=1"),
    ]
    assert "--host_devices=1" not in commands(JobSpec("a", ("run",)), Processes(1), 1)[0]
    for values in ({"num_processes": 0}, {"port": 0}, {"port": 70000}):
        with pytest.raises(UserError, match="must be at least 1|is not a port"):
            Processes(**values)


def test_output_is_prefixed_and_kept(tmp_path, capfd):
    gloo = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
    lines = [[*PYTHON, f"print('one {i}'); print('{gloo}'); import sys; print('two {i}', file=sys.stderr)"] for i in range(2)]
    assert run_all(lines, tmp_path) == (0, False)
    said = capfd.readouterr().out.splitlines()
    assert sorted(said) == ["[0] one 0", "[0] two 0", "[1] one 1", "[1] two 1"]
    assert sorted((tmp_path / "process_1.log").read_text().split("\n")) == ["", gloo, "one 1", "two 1"]
    run_all(lines[:1], tmp_path)
    assert capfd.readouterr().out.startswith("one 0\n")


def test_one_that_fails_ends_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "ALONE", 0.2)
    waits = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(143)); time.sleep(60)"
    begun = time.monotonic()
    assert run_all([[*PYTHON, waits], [*PYTHON, "raise SystemExit(7)"]], tmp_path) == (7, False)
    assert time.monotonic() - begun < 20
    assert "process 1 ended with status 7; ending the others" in capfd.readouterr().out
    assert run_all([[*PYTHON, waits], [*PYTHON, "import os; os.kill(os.getpid(), 9)"]], tmp_path)[0] == 137


def test_one_that_ignores_the_request_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "ALONE", 0.1)
    monkeypatch.setattr(local, "GRACE", 0.5)
    place = tmp_path / "pid"
    deaf = (
        "import signal, time, os; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open('{place}', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    failing = f"import os, time\nwhile not os.path.exists('{place}'): time.sleep(0.01)\ntime.sleep(0.1)\nraise SystemExit(3)"
    assert run_all([[*PYTHON, deaf], [*PYTHON, failing]], tmp_path)[0] == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_a_signal_is_passed_on_and_the_status_is_theirs(tmp_path):
    saves = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"open('{tmp_path}/ready-' + sys.argv[1], 'w').close()\ntime.sleep(60)"
    )

    def send():
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    before = signal.getsignal(signal.SIGTERM)
    assert run_all([[*PYTHON, saves, "0"], [*PYTHON, saves, "1"]], tmp_path) == (143, True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_is_started_again_where_that_helps(tmp_path, monkeypatch):
    script = tmp_path / "lcx.py"
    script.write_text(
        "import sys\nn = len(open('tries').read()) if __import__('os').path.exists('tries') else 0\n"
        "open('tries', 'a').write('.')\nsys.exit(int(sys.argv[1].split(',')[n]))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "commands", lambda job, options, port: [[sys.executable, "-S", str(script), job.words[0]]])
    for codes, most, status, tries in (("75,0", 2, 0, 2), ("75,75,75", 2, 75, 3), ("1,0", 2, 1, 1), ("75,0", 0, 75, 1)):
        (tmp_path / "tries").unlink(missing_ok=True)
        assert local.run(JobSpec("a", (codes,), max_restarts=most), Processes(), tmp_path / "logs") == status
        assert len((tmp_path / "tries").read_text()) == tries


def test_the_number_of_devices_is_each_process_own():
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_x=1"
    assert local._without_devices(flags) == "--xla_cpu_x=1" and local._without_devices("") == ""
