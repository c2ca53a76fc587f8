"""Steps that take much longer than others, and whom they waited for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lcx.core import processes
from lcx.training.slow_steps import SlowStep, SlowSteps


def watched(seconds, late=(), data=()):
    """Steps from 1 on, with what a process was late for some of them."""
    found = SlowSteps()
    for i, taken in enumerate(seconds, 1):
        found.add(i, taken, dict(late).get(i, 0.0), dict(data).get(i, 0.0))
    return found


def test_what_is_slow():
    usual = [2.0] * 10
    assert [one.step for one in watched([*usual, 4.1, 2.0, 9.0]).gather()] == [11, 13]
    assert watched([*usual, 3.9]).gather() == []  # not twice as long
    assert watched([0.1] * 10 + [0.9]).gather() == []  # not a second longer
    assert watched([0.1] * 10 + [1.2]).gather() == [SlowStep(11, 1.2, 0.1, "process 0", 0.0, 0.0)]
    assert watched([2.0] * 7 + [9.0]).gather() == []  # too few to know
    many = watched([*usual, *(10.0 + i for i in range(9))])
    assert [one.step for one in many.gather()] == [15, 16, 17, 18, 19]
    assert many.gather() == []


def test_a_step_after_something_else_is_not_judged():
    found = watched([2.0] * 10)
    found.skip()
    found.add(11, 30.0, 28.0, 0.0)
    found.add(12, 2.0, 0.0, 0.0)
    assert found.gather() == []


def test_whom_all_waited_for(monkeypatch):
    """Two processes, as threads; each exchange waits for both."""
    said, barrier, own = {}, threading.Barrier(2), threading.local()

    def exchange(name, value):
        said[name, own.index] = value
        barrier.wait(10)
        return [said[name, i] for i in range(2)]

    def gather(index, watch):
        own.index = index
        return watch.gather()

    monkeypatch.setattr(processes, "exchange", exchange)
    watches = [
        watched([2.0] * 10 + [9.0, 2.0, 6.0], {11: 0.1, 13: 4.0}, {13: 3.5}),
        watched([2.0] * 10 + [8.9, 2.0, 3.9], {11: 6.5, 13: 0.2}, {11: 6.0}),
    ]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(gather, range(2), watches)
    assert first == second == [
        SlowStep(11, 9.0, 2.0, "process 1", 6.5, 6.0), SlowStep(13, 6.0, 2.0, "process 0", 4.0, 3.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("late", "data", "said"),
    [
        (6.0, 5.9, ": process 3 on b was ready 6.0 s late; 5.9 s of that it waited for data"),
        (6.0, 0.1, ": process 3 on b was ready 6.0 s late"),
        (0.3, 0.1, ", and no process was late for it: a device or the network was slow"),
    ],
)
def test_what_is_said(late, data, said):
    assert SlowStep(41, 8.2, 2.1, "process 3 on b", late, data).sentence == f"step 41 took 8.2 s where 2.1 s are usual{said}"
