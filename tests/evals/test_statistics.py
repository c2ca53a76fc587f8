import math

import numpy as np
import pytest

from lcx.evals import comparison
from lcx.evals.results import EvalResult, Measurement
from lcx.evals.statistics import drawn_means, interval, paired


def test_paired_difference_of_shares_is_agresti_and_mins():
    before, after = [1] * 40 + [1] * 12 + [0] * 5 + [0] * 43, [1] * 40 + [0] * 12 + [1] * 5 + [0] * 43
    found = paired(before, after)
    # Half a pair is added to each of the four cells: (5.5 - 12.5) / 102, and its standard error.
    b, c, n = 5.5, 12.5, 102
    half = 1.959963985 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert found.mean == pytest.approx(-0.07) and (found.above, found.below) == (5, 12)
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half))


def test_no_change_in_a_few_items_proves_no_equality():
    few, many = paired([1] * 5, [1] * 5), paired([1] * 500, [1] * 500)
    assert few.mean == many.mean == 0 and few.low < -0.25 and few.high > 0.25
    assert -0.01 < many.low < 0 < many.high < 0.01


def test_pairing_sees_what_two_intervals_hide():
    rng = np.random.default_rng(1)
    hard = rng.normal(3, 1, 60)
    better = hard - rng.normal(0.05, 0.02, 60)
    found = paired(hard, better)
    assert found.high < 0 and found.low == pytest.approx(-0.055, abs=0.01)
    (_, high), (low, _) = interval(list(better)), interval(list(hard))
    assert low < high  # unpaired intervals overlap


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        before = rng.random(30) < 0.7
        after = np.where(rng.random(30) < 0.3, rng.random(30) < 0.4, before)
        found = paired(before.astype(float), after.astype(float))
        held.append(found.low <= 0.3 * (0.4 - 0.7) <= found.high)
    assert 0.92 < np.mean(held) < 0.99


def test_few_items_prove_little():
    alone = paired([3.0], [2.0])
    assert (alone.mean, alone.low, alone.high) == (-1.0, -math.inf, math.inf)
    # Student's quantile of two degrees of freedom is 4.303.
    few = paired([1.0, 1.0, 1.0], [1.1, 1.2, 1.3])
    assert (few.low, few.high) == pytest.approx((0.2 - 4.302653 * 0.1 / math.sqrt(3), 0.2 + 4.302653 * 0.1 / math.sqrt(3)))
    low, high = interval([0.5])
    assert high - low > 0.8


def test_student_holds_the_true_difference_of_few_items():
    rng = np.random.default_rng(0)
    held = [(found := paired(np.zeros(4), rng.normal(0.3, 1, 4))).low <= 0.3 <= found.high for _ in range(1000)]
    assert 0.93 < np.mean(held) < 0.97


def test_what_is_not_of_the_same_items_is_refused():
    with pytest.raises(ValueError, match="3 and 2 scores cannot be paired"):
        paired([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="0 and 0 scores"):
        paired([], [])


def test_drawn_means_are_uncertain_even_where_every_answer_is_right():
    rng = np.random.default_rng(0)
    means = drawn_means([1] * 20, 4000, rng)
    assert np.quantile(means, 0.025) < 0.9 and means.max() <= 1
    scores = [0.25, 0.5, 1.0] * 30
    means = drawn_means(scores, 4000, rng)
    assert means.mean() == pytest.approx(np.mean(scores), abs=0.01) and means.std() == pytest.approx(
        np.std(scores) / 90**0.5, rel=0.1
    )


def result(label, shares, items=20, digest="d", metric="accuracy", trained=256):
    rows = [
        Measurement(
            "needles", metric, length, share, items, depth,
            scores=(1.0,) * round(share * items) + (0.0,) * round((1 - share) * items), digest=f"{digest} {length} {depth}",
        )
        for length, share in shares.items()
        for depth in (0.0, 1.0)
    ]  # fmt: skip
    return EvalResult(label, trained, rows=tuple(rows))


def test_effective_length_has_an_interval():
    found = result("after", {256: 1.0, 512: 0.9, 1024: 0.8, 2048: 0.2})
    assert found.effective_length() == 512
    low, high = found.effective_interval()
    assert low in (0, 256) and high == 1024
    sure = result("after", {256: 1.0, 512: 1.0, 1024: 0.0}, items=400)
    assert sure.effective_interval() == (512, 512)
    bare = EvalResult("after", 256, rows=(Measurement("needles", "accuracy", 256, 1.0, 20),))
    assert bare.effective_interval() is None


def test_rows_of_the_same_items_are_compared():
    before = result("before", {256: 1.0, 512: 0.5, 1024: 0.0})
    after = result("after", {256: 0.2, 512: 0.5, 1024: 1.0}, trained=1024)
    found = comparison.compare(before, after)
    assert [(row.length, row.n, row.verdict) for row in found] == [(256, 40, "worse"), (512, 40, "equal"), (1024, 40, "better")]
    assert [row.difference.mean for row in found] == pytest.approx([-0.8, 0.0, 1.0])
    assert [row.length for row in comparison.compare(before, after, longest=256)] == [256]
    assert comparison.compare(before, result("after", {256: 1.0}, digest="other")) == []
    assert comparison.compare(before, after, scheme="yarn") == []


def test_a_single_item_has_no_verdict():
    before, after = (
        EvalResult(name, 256, rows=(Measurement("perplexity", "nll", 256, value, 1, scores=(value,), digest="one"),))
        for name, value in (("before", 3.0), ("after", 2.0))
    )
    (row,) = comparison.compare(before, after)
    assert (row.verdict, row.has_interval, row.difference.mean) == ("unknown", False, -1.0)


def test_less_loss_is_better():
    before, after = result("before", {256: 1.0}, metric="nll"), result("after", {256: 0.1}, metric="nll")
    assert [row.verdict for row in comparison.compare(before, after)] == ["better"]
    assert [row.verdict for row in comparison.compare(after, before)] == ["worse"]
