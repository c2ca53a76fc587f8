import json
import math

import pytest

from lcx.core.errors import UserError
from lcx.evals import results
from lcx.evals.results import EvalResult, NeedleGrid, PerplexityCurve, PerplexityPoint, PositionLoss, wilson


@pytest.mark.parametrize(
    ("correct", "items", "low", "high"),
    # Published examples: Newcombe 1998 (81/263, 15/148, 0/20, 1/29) and the textbook 8/10.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (8, 10, 0.4902, 0.9433)],
)
def test_wilson_interval_has_its_published_values(correct, items, low, high):
    assert wilson(correct, items) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_is_symmetric_and_reaches_the_ends():
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    low, high = wilson(3, 11)
    assert wilson(8, 11) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 0) == (0.0, 1.0)


def grid(**changes) -> NeedleGrid:
    values = dict(lengths=(256, 512, 1024), depths=(0.0, 1.0), correct=((20, 18, 2), (20, 17, 20)), items=20, trained=256)
    return NeedleGrid(**{**values, **changes})


def test_grid_means():
    found = grid()
    assert found.by_length() == pytest.approx({256: 1.0, 512: 0.875, 1024: 0.55})
    assert found.mean() == pytest.approx((1 + 0.875 + 0.55) / 3)
    assert found.mean(above=256) == pytest.approx((0.875 + 0.55) / 2)
    assert found.worst() == pytest.approx(0.1)
    assert math.isnan(found.mean(above=1024))
    assert found.interval(0, 2) == wilson(2, 20)
    assert found.interval(length=1) == wilson(35, 40)
    assert found.interval() == wilson(97, 120)


def test_effective_length_needs_every_shorter_length():
    assert grid().effective_length(0.856) == 512
    assert grid().effective_length(0.9) == 256
    assert grid(correct=((10, 20, 20), (10, 20, 20))).effective_length() == 0
    assert grid(correct=((20, 20, 20), (20, 20, 20))).effective_length() == 1024


def test_result_comes_back_from_json(tmp_path):
    curve = PerplexityCurve(
        (PerplexityPoint(256, 128, 4096, 1.5, 128, 1.25), PerplexityPoint(512, 512, 4096, math.inf, 128, math.nan)),
        PositionLoss(512, (0, 1, 512), (2.0, 1.0), (8, 4088)),
        bytes_per_token=2.0,
        scheme="yarn",
        trained=256,
    )
    result = EvalResult("after", 4096, 70, (grid(),), (curve,), 3.5, {"evals": {"seed": 0, "zero_shot": ["yarn"]}})
    path = results.write(result, tmp_path / "eval" / "after.json")
    back = results.read(path)
    assert back.needles == result.needles
    assert back.perplexity[0].points[0] == curve.points[0]
    assert math.isnan(back.perplexity[0].points[1].final_nll)
    assert back.perplexity[0].points[1].perplexity == math.inf
    assert back.settings == result.settings
    assert back.grid() == grid() and back.grid("yarn") is None
    assert back.curve("yarn").bits_per_byte(256) == pytest.approx(1.5 / math.log(2) / 2)
    assert [p.name for p in path.parent.iterdir()] == ["after.json"]


def test_wrong_files_are_answered(tmp_path):
    with pytest.raises(UserError, match="does not exist; `lcx eval` writes it"):
        results.read(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"label": ')
    with pytest.raises(UserError, match="cut.json is not JSON"):
        results.read(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text(json.dumps({"label": "x", "traind": 3}))
    with pytest.raises(UserError, match="did you mean 'trained'"):
        results.read(tmp_path / "other.json")
