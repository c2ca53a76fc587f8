"""Long-dependency scores from numbers: cases made by hand, and the formulas written out once more in plain loops."""

import math

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.curation.dependency import (
    EntropyDropSettings,
    LadmSettings,
    LdsSettings,
    LongAttnSettings,
    entropy_drop,
    ladm,
    lds,
    lds_pairs,
    longattn,
    longattn_parts,
    longce_weights,
)

SMALL = LdsSettings(segment=4, window=20, pairs=6)


def test_pairs_are_drawn_once_each_and_point_back():
    drawn = lds_pairs(5, SMALL, np.random.default_rng(3))
    assert drawn.shape == (6, 2) and len({tuple(pair) for pair in drawn}) == 6 and np.all(drawn[:, 1] < drawn[:, 0])
    np.testing.assert_array_equal(drawn, lds_pairs(5, SMALL, np.random.default_rng(3)))
    everything = lds_pairs(3, SMALL, np.random.default_rng(0))
    assert everything.tolist() == [[1, 0], [2, 0], [2, 1]]
    counts = sum(np.bincount(lds_pairs(5, SMALL, np.random.default_rng(i)) @ [5, 1], minlength=25) for i in range(300))
    assert set(np.flatnonzero(counts)) == {5 * i + j for i in range(5) for j in range(i)} and counts[counts > 0].min() > 130


def test_lds_by_hand():
    # Segment 1 falls from 10 to 8 behind 0: strength .2, distance 1/4, one pair, so that it is specific. Segment 3 does not fall.
    pairs = np.asarray([[1, 0], [3, 0], [3, 1]])
    assert lds(np.asarray([5, 10, 7, 9]), pairs, np.asarray([8, 9, 9]), SMALL) == pytest.approx(0.2 + 0.25)
    # Exactly at the threshold, and at rises of perplexity, nothing counts.
    assert lds(np.asarray([5, 10]), pairs[:1], np.asarray([9.0]), SMALL) == 0
    assert lds(np.asarray([5, 10]), pairs[:1], np.asarray([11.0]), SMALL) == 0
    # Segment 3 is lowered by 3 behind 0 and by 3 behind 1: it does not matter which, and the score is 0.
    assert lds(np.asarray([5, 10, 7, 9]), pairs[1:], np.asarray([6, 6]), SMALL) == pytest.approx(0, abs=1e-12)
    # By ln 3 behind 0 and by 0 behind 1: the softmax is (3/4, 1/4).
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    wanted = (math.log(3) / 9 + 3 / 4) * (1 - entropy / math.log(2))
    assert lds(np.asarray([5, 10, 7, 9]), pairs[1:], np.asarray([9 - math.log(3), 9]), SMALL) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_lds_against_loops(seed):
    rng, settings = np.random.default_rng(seed), LdsSettings(segment=2, window=24, pairs=30)
    alone = rng.uniform(2, 40, 12)
    pairs = lds_pairs(12, settings, rng)
    behind = alone[pairs[:, 0]] * rng.uniform(0.3, 1.2, len(pairs))
    total = 0.0
    for i in range(12):
        falls = {j: alone[i] - p for (k, j), p in zip(pairs.tolist(), behind, strict=True) if k == i}
        if not falls:
            continue
        powers = [math.exp(x) for x in falls.values()]
        shares = [x / sum(powers) for x in powers]
        specific = 1.0
        if len(falls) > 1:
            specific = (math.log(len(falls)) + sum(s * math.log(s) for s in shares)) / math.log(len(falls))
        total += sum((x / alone[i] + (i - j) / 11) * specific for j, x in falls.items() if x / alone[i] > 0.1)
    assert lds(alone, pairs, behind, settings) == pytest.approx(total, rel=1e-9) and total > 0


def test_lds_with_falls_that_would_overflow():
    pairs = np.asarray([[2, 0], [2, 1]])
    assert lds(np.asarray([1.0, 1.0, 1e6]), pairs, np.asarray([1.0, 1e6]), SMALL) == pytest.approx(1 - 1e-6 + 0.5)


def test_ladm_by_hand():
    settings = LadmSettings(chunk=2, stride=4, interval=4, window=32)
    mass = np.zeros((1, 4, 8))
    # The chunk at 8 may look at the block at 4 alone, so that its mass has no deviation; the one at 12 at those at 8 and 4.
    mass[0, 2, 2], mass[0, 3, 4], mass[0, 3, 2] = 1.5, 1.0, 0.4
    mass[0, 3, [0, 1, 3, 5]] = 7  # outside of the intervals
    wanted = [0, (1.0 * 4 / 16 + 0.4 * 8 / 16) * 0.3 * 12 / 16]
    assert ladm(mass, 16, settings) == pytest.approx(np.mean(wanted))
    # Of 13 tokens the chunk at 12 has but one, and does not count.
    assert ladm(mass, 13, settings) == 0 and math.isnan(ladm(mass, 9, settings))
    assert LadmSettings().first == 1024


@pytest.mark.parametrize("tokens", [61, 96])
def test_ladm_against_loops(tokens):
    settings = LadmSettings(chunk=4, stride=8, interval=12, window=96)
    mass = np.random.default_rng(0).uniform(0, 1, (3, 12, 24))
    scores = []
    for layer in mass:
        for c in range(12):
            start = 8 * c
            if start + 4 > tokens:
                continue
            focus = [(i, layer[c, (start - i) // 4]) for i in range(12, 96, 12) if start - i >= 4]
            if focus:
                far = sum(i / tokens * x for i, x in focus)
                scores.append(far * np.std([x for _, x in focus]) * start / tokens)
    assert ladm(mass, tokens, settings) == pytest.approx(np.mean(scores), rel=1e-12)


def test_longattn():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(40), (3, 40))
    far = np.where(np.arange(40)[:, None] - np.arange(40) >= 10, weights, 0)
    strength, variance = longattn_parts(far.sum((1, 2)), (far**2).sum((1, 2)), 40)
    assert strength == pytest.approx(np.mean([a.sum() / 40 for a in far]))
    assert variance == pytest.approx(np.mean([np.var(a) for a in far]))
    parts = np.asarray([[0.1, 0.0], [0.3, 0.02], [0.2, 0.01]])
    np.testing.assert_allclose(longattn(parts, parts.min(0), parts.max(0), 0.5), [0, 0.5, 0.25])
    assert longattn(parts[:1], parts[0], parts[0], 0.5).tolist() == [0]


def test_entropy_drop():
    before = np.asarray([np.nan, 2.0, 3.0, 1.0])
    assert entropy_drop(before, np.asarray([9.0, 1.0, 3.0, 1.5])) == pytest.approx(0.5 / 3)
    assert math.isnan(entropy_drop(before[:1], before[:1]))
    assert EntropyDropSettings().first(4096) == 3072 and EntropyDropSettings(tail=1 / 3, window=4096).first(10) == 6


def test_longce_weights():
    gains = np.asarray([np.nan, -1.0, 0.0, math.log(4.9), math.log(5.1), 1000.0])
    np.testing.assert_allclose(longce_weights(gains), [1, math.exp(-1), 1, 4.9, 5, 5])
    assert longce_weights(gains, most=2.0).max() == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LdsSettings(segment=128, window=200), "lds.window=200 must hold at least two segments of lds.segment=128"),
        (lambda: LdsSettings(pairs=0), "lds.pairs=0 must be above 0"),
        (lambda: LadmSettings(stride=500), "ladm.stride=500 must be a multiple of ladm.chunk=128"),
        (lambda: LadmSettings(window=1024), "ladm.window=1024 holds no chunk to score; make it at least 1152"),
        (lambda: EntropyDropSettings(window=600), "leaves the last 0.25 of a document no more than entropy_drop.short=512"),
        (lambda: EntropyDropSettings(tail=1.5), "entropy_drop.tail=1.5 must be a share of the document above 0, at most 1"),
        (lambda: LongAttnSettings(distance=0.0), "longattn.distance=0.0 must be between 0 and 1"),
        (lambda: LongAttnSettings(min_tokens=0), "longattn.min_tokens=0 must be above 0"),
    ],
)
def test_wrong_settings(make, said):
    with pytest.raises(UserError, match=said):
        make()
