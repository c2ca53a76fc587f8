"""The monitor's statistic on curves whose nature is known, and the ladder of attempts."""

import math

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.positions.registry import from_config
from lcx.training.ladder import Attempt, at_theta, attempt_of, best, theta_of, thetas
from lcx.training.monitor import MonitorConfig, Probe, curve, decide

CONFIG = MonitorConfig(steps=40, skip=0)
BEFORE = Probe(text_loss=2.5, needle_loss=3.0, needle_accuracy=0.1)
BETTER = Probe(text_loss=2.3, needle_loss=1.5, needle_accuracy=0.6)


def falling(noise, seed=0, steps=40):
    rng = np.random.default_rng(seed)
    return (2.0 * np.exp(-0.01 * np.arange(steps)) * np.exp(noise * rng.standard_normal(steps))).tolist()


def oscillating(seed=0, steps=40):
    rng = np.random.default_rng(seed)
    return (2.2 + 0.15 * np.sin(np.arange(steps) / 3.0 + rng.uniform(0, 6)) + 0.02 * rng.standard_normal(steps)).tolist()


def test_statistics_of_an_exact_exponential():
    found = curve(falling(0.0))
    np.testing.assert_allclose([found.fall, found.up_pairs], [0.39, 0.0], atol=1e-12)
    assert found.wobble < 1e-12 and found.straightness > 1e6


def test_the_scale_of_the_loss_does_not_matter():
    losses = falling(0.05)
    a, b = curve(losses), curve([7 * x for x in losses])
    np.testing.assert_allclose([a.fall, a.wobble], [b.fall, b.wobble], rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_noise_passes_and_oscillation_does_not(seed):
    assert decide(CONFIG, falling(0.05, seed), BEFORE, BETTER).verdict == "straight down"
    assert decide(CONFIG, oscillating(seed), BEFORE, BETTER).verdict == "oscillating"


def test_a_few_outliers_do_not_matter():
    losses = falling(0.03)
    for i in (3, 17, 30):
        losses[i] *= 3
    assert decide(CONFIG, losses, BEFORE, BETTER).verdict == "straight down"


def test_perplexity_alone_is_not_enough():
    decision = decide(CONFIG, falling(0.02), BEFORE, Probe(2.3, 2.99, 0.1))
    assert decision.verdict == "oscillating" and "needle gain" in decision.reason
    assert decide(CONFIG, falling(0.02), BEFORE, Probe(2.3, 2.99, 0.95)).verdict == "straight down"


def test_a_stage_is_measured_against_the_one_before():
    """A wrong theta begins high and falls; a right one has nothing left to fall. Seen at 0.02 and 1 times critical."""
    reference = Probe(1.757, 0.293, 0.854)
    flat = [x / y for x, y in zip(falling(0.07), falling(0.0), strict=True)]
    wrong = decide(CONFIG, falling(0.05), Probe(1.897, 4.233, 0.109), Probe(1.717, 2.162, 0.305), reference)
    right = decide(CONFIG, flat, Probe(1.774, 1.313, 0.641), Probe(1.699, 0.354, 0.875), reference)
    assert (wrong.verdict, right.verdict) == ("oscillating", "straight down")
    assert "needles are 1.87 nats above the previous stage" in wrong.reason
    assert decide(CONFIG, flat, BEFORE, Probe(2.0, 0.3, 0.95), reference).reason.startswith("held-out text is 0.24 nats above")


def test_a_loss_that_is_not_finite_is_no_descent():
    losses = falling(0.02)
    losses[20] = math.nan
    assert decide(CONFIG, losses, BEFORE, BETTER).verdict == "oscillating"


def test_thetas_around_the_critical_base():
    ladder = thetas(CONFIG, (), None, (500.0, 256), 1024)
    assert len(ladder) == 4 and ladder[1:] == [2 * ladder[0], 0.5 * ladder[0], 0.25 * ladder[0]]
    assert thetas(CONFIG, (), ladder[0], (500.0, 256), 1024) == ladder
    assert thetas(CONFIG, (), 7.0, (500.0, 256), 1024)[:2] == [7.0, ladder[0]]
    assert thetas(CONFIG, (3.0, 4.0), 7.0, (500.0, 256), 1024) == [3.0, 4.0]


def test_local_layers_keep_their_theta():
    schemes = {"global": from_config("rope:theta=1000"), "local": from_config("rope:theta=10")}
    changed = at_theta(schemes, 5000.0)
    assert theta_of(changed) == 5000.0 and changed["local"] == schemes["local"]


def row(attempt, theta, verdict, needle=1.0):
    return {"attempt": attempt, "theta": theta, "verdict": verdict, "probe_after": {"needle_loss": needle, "text_loss": 1.0}}


def test_attempts_follow_the_decisions():
    bad = [row(0, 1.0, "oscillating", 3.0), row(1, 2.0, "oscillating", 2.0)]
    assert attempt_of([], [1.0, 2.0, 3.0]) == Attempt(0, 1.0, True)
    assert attempt_of(bad, [1.0, 2.0, 3.0]) == Attempt(2, 3.0, True)
    assert attempt_of([*bad[:1], row(1, 2.0, "straight down")], [1.0, 2.0, 3.0]) == Attempt(1, 2.0, False)
    assert attempt_of(bad, [1.0, 2.0]) == Attempt(1, 2.0, False)
    assert attempt_of([*bad, row(2, 3.0, "oscillating", math.nan)], [1.0, 2.0, 3.0]) == Attempt(3, 2.0, False)
    assert best(bad) is bad[1]


def test_impossible_settings():
    with pytest.raises(UserError, match="skip=38"):
        MonitorConfig(steps=40, skip=38)
    with pytest.raises(UserError, match="probe_rows=1"):
        MonitorConfig(probe_rows=1)
