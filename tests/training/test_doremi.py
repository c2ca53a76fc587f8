"""DoReMi's rule against the formulas, worked out domain by domain and token by token in Python floats."""

import math

import jax
import numpy as np
import pytest

from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.training.doremi import DomainWeights, DoReMiConfig, excess_by_part, update


def by_hand(excesses, step_size, smoothing):
    """(weights, running mean) after each update; None is an absent domain."""
    domains = len(excesses[0])
    log_weights, last, total, found = [math.log(1 / domains)] * domains, [0.0] * domains, [0.0] * domains, []
    for count, excess in enumerate(excesses, 1):
        last = [old if new is None else new for old, new in zip(last, excess, strict=True)]
        raised = [a + step_size * e for a, e in zip(log_weights, last, strict=True)]
        normalizer = math.fsum(math.exp(a) for a in raised)
        weights = [(1 - smoothing) * math.exp(a) / normalizer + smoothing / domains for a in raised]
        log_weights = [math.log(w) for w in weights]
        total = [t + w for t, w in zip(total, weights, strict=True)]
        found.append((weights, [t / count for t in total]))
    return found


@pytest.mark.parametrize(("step_size", "smoothing"), [(1.0, 1e-3), (0.3, 0.2), (2.0, 0.0)])
def test_updates_follow_the_formulas(step_size, smoothing):
    rng = np.random.default_rng(0)
    excesses = [[float(x) if rng.random() < 0.7 else None for x in rng.exponential(0.5, 4)] for _ in range(40)]
    excesses[0][2] = None  # absent before it was ever seen
    state = DomainWeights.uniform(4)
    for excess, (weights, mean) in zip(excesses, by_hand(excesses, step_size, smoothing), strict=True):
        state = update(state, np.asarray([math.nan if x is None else x for x in excess]), DoReMiConfig(step_size, smoothing))
        np.testing.assert_allclose(state.now, weights, rtol=1e-12)
        np.testing.assert_allclose(state.mean, mean, rtol=1e-12)
    assert state.updates == 40 and state.now.sum() == pytest.approx(1, abs=1e-14)


def test_smoothing_bounds_every_weight_from_below():
    state = DomainWeights.uniform(3)
    for _ in range(500):
        state = update(state, np.asarray([0.0, 5.0, 0.0]), DoReMiConfig())
    np.testing.assert_allclose(state.now[[0, 2]], 1e-3 / 3, rtol=1e-2)
    assert state.now[1] > 0.999


def test_an_absent_domain_counts_with_its_last_excess():
    first = update(DomainWeights.uniform(2), np.asarray([0.5, 0.0]), DoReMiConfig(smoothing=0.0))
    second = update(first, np.asarray([np.nan, 0.0]), DoReMiConfig(smoothing=0.0))
    assert second.now[0] / second.now[1] == pytest.approx(math.exp(1.0))
    assert second.excess.tolist() == [0.5, 0.0]


def test_tokens_are_clipped_before_they_are_averaged():
    """Of a domain as good as the reference on average, what it still has to learn counts."""
    rng = np.random.default_rng(1)
    proxy, reference = rng.exponential(2.0, (6, 16)).astype(np.float32), rng.exponential(2.0, (6, 16)).astype(np.float32)
    weights = (rng.random((6, 17)) * (rng.random((6, 17)) < 0.7)).astype(np.float32)
    parts = np.array([3, 0, 0, 1, 3, 1], np.int32)
    batch = Batch.from_tokens(np.zeros((6, 17), np.int32), weights).replace(row_parts=jax.numpy.asarray(parts), num_parts=4)
    found = np.asarray(excess_by_part(proxy, reference, batch))
    for part in range(4):
        tokens = [
            max(float(proxy[row, i]) - float(reference[row, i]), 0.0)
            for row in range(6)
            for i in range(16)
            if parts[row] == part and weights[row, i + 1] > 0
        ]
        assert np.isnan(found[part]) if not tokens else found[part] == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
    assert np.isnan(found).tolist() == [False, False, True, False]
    whole = np.maximum((proxy[1:3] - reference[1:3]).mean(), 0)
    assert found[0] > whole + 0.1


@pytest.mark.parametrize(("values", "message"), [((0.0, 0.1), "step_size=0.0 must be above 0"), ((1.0, 1.0), "smoothing=1.0")])
def test_wrong_settings(values, message):
    with pytest.raises(UserError, match=message):
        DoReMiConfig(*values)
