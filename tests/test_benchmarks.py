"""The benchmark's own side, at a length that takes no time."""

import math
import sys
from pathlib import Path

import pytest

SIDES = Path(__file__).resolve().parents[1] / "benchmarks" / "sides"


@pytest.fixture
def sides(monkeypatch):
    monkeypatch.syspath_prepend(str(SIDES))
    import lcx_side
    import side

    yield lcx_side, side
    for name in ("lcx_side", "side"):
        del sys.modules[name]


@pytest.mark.slow
def test_lcx_side_takes_the_same_steps_on_one_device_and_two(sides):
    lcx_side, side = sides
    (step, facts), (on_two, same_facts) = (lcx_side.build(1, 16, devices) for devices in (1, 2))
    D, F, V, L = (side.MODEL[name] for name in ("model_dim", "mlp_dim", "vocab_size", "num_layers"))
    assert facts["parameters"] == 2 * V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D
    # The four batches come round: the model has then learned some of them by heart.
    losses = [step() for _ in range(8)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[4:]) < sum(losses[:4])
    assert (same_facts, [on_two() for _ in range(8)]) == (facts, pytest.approx(losses, rel=1e-5))


def test_batches_are_the_same_each_time(sides):
    _, side = sides
    one, two = next(side.batches(2, 8)), next(side.batches(2, 8))
    assert one.shape == (2, 9)
    assert (one == two).all()
