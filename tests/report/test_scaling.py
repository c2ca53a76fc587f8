import dataclasses

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.evals import results
from lcx.evals.results import EvalResult, Measurement
from lcx.report import history, scaling
from lcx.report.report import write_report


def result(label, step, shares, items=40, parameters=None):
    rows = [
        Measurement(task, "score", length, share, items, scores=(1.0,) * round(share * items) + (0.0,) * round((1 - share) * items))
        for (task, length), share in shares.items()
    ]
    return EvalResult(label, 4096, step, tuple(rows), settings={} if parameters is None else {"parameters": parameters})


def checkpoints(count=4):
    return [result(f"step_{2**i}", 2**i, {("copy", 256): 0.2 * i, ("copy", 512): 0.1, ("vt", 256): 0.5}) for i in range(count)]


def test_points_lie_at_every_checkpoint_and_a_line_through_them():
    what, at = scaling.axis(checkpoints())
    assert what == "step" and at == {"step_1": 1.0, "step_2": 2.0, "step_4": 4.0, "step_8": 8.0}
    found = scaling.points(checkpoints(), at)
    assert set(found) == {("copy", 256), ("copy", 512), ("vt", 256)}
    rising = found["copy", 256]
    assert rising.x == (1, 2, 4, 8) and rising.value == pytest.approx((0, 0.2, 0.4, 0.6))
    assert all(low <= value <= high for low, value, high in zip(rising.low[1:], rising.value[1:], rising.high[1:], strict=True))
    made = scaling.fit(rising)
    assert made.slope == pytest.approx(0.2) and made.low < 0.2 < made.high and made.low > 0.1
    assert made.line[[0, -1]] == pytest.approx([0, 0.6]) and np.all(made.band[0] <= made.band[1])
    flat = scaling.fit(found["copy", 512])
    assert flat.slope == pytest.approx(0, abs=1e-12) and flat.low < 0 < flat.high


def test_intervals_shrink_with_items():
    few, many = (scaling.fit(scaling.points(runs, scaling.axis(runs)[1])["copy", 256]) for runs in (
        [result(f"s{i}", 2**i, {("copy", 256): 0.2 * i}, items) for i in range(4)] for items in (20, 500)))  # fmt: skip
    assert many.high - many.low < 0.4 * (few.high - few.low)


def test_sizes_come_before_steps_and_two_points_are_no_curve():
    sizes = [result(f"m{n}", 7, {("copy", 256): 0.3}, parameters=n) for n in (1000, 2000, 4000)]
    assert scaling.axis(sizes)[0] == "parameters"
    assert scaling.axis(sizes[:2]) is None and scaling.curves(checkpoints(2)) == {}
    assert scaling.axis([dataclasses.replace(one, step=None, settings={}) for one in sizes]) is None


def test_long_lists_of_lengths_are_thinned():
    runs = [result(f"s{i}", 2**i, {("copy", 256 * n): 0.1 * n for n in range(1, 8)}) for i in range(3)]
    (figure,) = scaling.curves(runs).values()
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert [label.partition(":")[0] for label in labels] == ["256", "768", "1,280", "1,792"]


def test_a_report_shows_other_runs_beside_its_own(tmp_path):
    for name, size in (("small", 1000), ("medium", 2000), ("large", 4000)):
        one = result("after", 5, {("copy", 256): size / 4000}, parameters=size)
        results.write(one, tmp_path / name / "eval" / "after.json")
    others = [tmp_path / name / "eval" / "after.json" for name in ("small", "medium")]
    page = write_report(tmp_path / "large", others).read_text()
    assert "scaling_copy" in page and (tmp_path / "large" / "plots" / "scaling_copy.png").exists()
    assert "medium/after" in page and "small/after" in (tmp_path / "large" / "scores.csv").read_text()
    run = history.load(tmp_path / "large", others)
    assert [found.label for found in run.evals] == ["after", "small/after", "medium/after"] and run.after.label == "after"
    with pytest.raises(UserError, match="does not exist; `lcx run` writes eval/before.json"):
        history.load(tmp_path / "large", [tmp_path / "none.json"])
