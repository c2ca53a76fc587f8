"""The process around the one that computes: what it makes of its end, and whether it starts it again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lcx.core import exits
from lcx.launch import supervisor


def child(code):
    """A program that may say what it does on its pipe."""
    head = "import os, signal, sys, time\nsay = lambda s: os.write(int(os.environ['LCX_PULSE']), (s + '\\n').encode())\n"
    return [sys.executable, "-c", head + code]


@pytest.mark.parametrize("code", [exits.DONE, exits.WRONG, exits.INTERRUPTED, exits.PREEMPTED])
def test_statuses_that_restart_nothing(code, tmp_path):
    mark = tmp_path / "starts"
    program = f"open({str(mark)!r}, 'a').write('x'); say('at step 3'); say('end {code} because'); sys.exit({code})"
    assert supervisor.supervise(child(program), 3, 30.0) == code
    assert mark.read_text() == "x"


def test_it_is_started_again_until_it_is_well(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: None)
    mark = tmp_path / "starts"
    program = f"""
mark = {str(mark)!r}
attempt = os.environ['LCX_ATTEMPT']
open(mark, 'a').write(attempt)
say('at step 17')
if attempt == '0':
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == '1':
    say('end 75 process 1 is lost')
    sys.exit(75)
"""
    assert supervisor.supervise(child(program), 2, 30.0) == exits.DONE
    assert mark.read_text() == "012"
    said = capfd.readouterr().err
    assert "it was ended by SIGKILL, perhaps for want of memory; it was last at 'step 17'" in said
    assert "starting again (1 of 2)" in said and "starting again (2 of 2)" in said


def test_no_more_often_than_asked(tmp_path):
    mark = tmp_path / "starts"
    program = f"open({str(mark)!r}, 'a').write('x'); say('at x'); os.kill(os.getpid(), signal.SIGSEGV)"
    assert supervisor.supervise(child(program), 0, 30.0) == exits.RESTART
    assert mark.read_text() == "x"


def test_a_stopped_process_is_killed(capfd):
    begun = time.monotonic()
    assert supervisor.supervise(child("say('at step 9'); os.kill(os.getpid(), signal.SIGSTOP)"), 0, 0.5) == exits.RESTART
    assert time.monotonic() - begun < 10
    assert "gave no sign of life for 1 s and was killed; it was last at 'step 9'" in capfd.readouterr().err


def test_signals_go_on():
    """SIGTERM to the supervisor reaches the process, whose status is the supervisor's."""
    program = child("signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); say('at x'); print('up', flush=True); time.sleep(30)")
    outer = f"from lcx.launch import supervisor; import sys; sys.exit(supervisor.supervise({program!r}, 5, 30.0))"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == exits.PREEMPTED


def test_wrong_flags_are_not_tried_again(tmp_path):
    mark = tmp_path / "starts"
    assert supervisor.supervise(child(f"open({str(mark)!r}, 'a').write('x'); sys.exit(1)"), 3, 30.0) == exits.WRONG
    assert mark.read_text() == "x"


def test_it_loads_no_jax():
    code = "import sys; import lcx.launch.supervisor, lcx.cli.distributed_flags; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
