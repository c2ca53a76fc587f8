"""Which process is lost, and which one hangs."""

import time

import pytest

from lcx.core import exits, processes
from lcx.launch import heartbeat
from lcx.launch.heartbeat import FINISHED, Rolls


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes._JOB, "hosts", ["host-a", "host-b", "host-c"])
    return now


def test_a_silent_process_is_named(clock):
    rolls = Rolls(3, silence=30, hang=600)
    for second in range(60):
        clock[0] = 1000.0 + second
        for process in (0, 1, 2):
            if process != 1 or second < 20:
                rolls.hear(process, second, second, f"step {second}")
        verdict = rolls.judge()
        assert (verdict is not None) == (second > 49)
        if verdict is not None:
            assert verdict.code == exits.RESTART
            assert verdict.reason.startswith("process 1 on host-b has not been heard of for 31 s")
            assert "it was last at 'step 19'" in verdict.reason
            break


def test_the_process_behind_the_others_hangs(clock):
    rolls = Rolls(3, silence=30, hang=600)
    for beat in range(700):
        clock[0] = 1000.0 + beat
        for process in (0, 1, 2):
            # Process 2 stays at step 40; the others can begin one more.
            step = min(beat, 40 if process == 2 else 41)
            rolls.hear(process, beat, step, f"step {step}")
        if verdict := rolls.judge():
            break
    assert beat == 641
    found = "process 2 on host-c hangs: for 600 s it has been at 'step 40', the others wait at 'step 41'"
    assert verdict.reason.startswith(found)


def test_all_hang(clock):
    rolls = Rolls(2, silence=1e9, hang=60)
    for process in (0, 1):
        rolls.hear(process, 1, 1, "the compiler")
    clock[0] += 61
    assert "all processes hang: for 60 s they have been at 'the compiler'" in rolls.judge().reason


def test_who_has_finished_does_not_hang(clock):
    rolls = Rolls(2, silence=1e9, hang=60)
    rolls.hear(0, 1, 5, "the report")
    rolls.hear(1, 1, 4, FINISHED)
    clock[0] += 59
    rolls.hear(0, 2, 6, "the report")
    clock[0] += 30
    assert rolls.judge() is None


def test_a_process_alone_meets_nobody():
    begun = time.monotonic()
    assert processes.exchange("something", 3) == [3]
    processes.meet("somewhere")
    processes.agree("versions", {"jax": "1"}, "install it")
    assert time.monotonic() - begun < 0.1 and processes.is_first() and processes.named(0) == "process 0"
