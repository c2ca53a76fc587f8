import dataclasses
import json
import math

import pytest

from lcx.core.errors import UserError
from lcx.evals import results
from lcx.evals.results import EvalResult, Measurement, perplexity
from lcx.evals.statistics import wilson


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


def grid(correct=((20, 18, 2), (20, 17, 20)), items=20, scheme="none") -> EvalResult:
    rows = (
        Measurement("needles", "accuracy", length, count / items, items, depth, None, *wilson(count, items), scheme)
        for i, length in enumerate((256, 512, 1024))
        for depth, count in zip((0.0, 1.0), (row[i] for row in correct), strict=True)
    )
    return EvalResult("after", 256, rows=tuple(rows))


def test_means_over_rows():
    found = grid()
    assert found.by_length() == pytest.approx({256: 1.0, 512: 0.875, 1024: 0.55})
    assert found.table() == [[1.0, 0.9, 0.1], [1.0, 0.85, 1.0]]
    assert found.mean() == pytest.approx((1 + 0.875 + 0.55) / 3)
    assert found.mean(above=256) == pytest.approx((0.875 + 0.55) / 2)
    assert found.worst() == pytest.approx(0.1)
    assert math.isnan(found.mean(above=1024)) and math.isnan(found.worst(above=1024))
    assert found.select(depth=0.0, length=1024).interval() == wilson(2, 20)
    assert found.select(length=512).interval() == wilson(35, 40)
    assert found.interval() == wilson(97, 120) and found.interval(above=256) == wilson(57, 80)


def test_a_selection_is_a_result_and_an_empty_one_is_none():
    both = dataclasses.replace(grid(), rows=grid().rows + grid(scheme="yarn").rows)
    assert both.select(scheme="yarn").rows == grid(scheme="yarn").rows and both.values("scheme") == ["none", "yarn"]
    assert both.select(task="perplexity") is None
    with pytest.raises(UserError, match="no measurement with length=300; measured lengths: 256, 512, 1024"):
        both.value(length=300)


def test_effective_length_needs_every_shorter_length():
    assert grid().effective_length(0.856) == 512
    assert grid().effective_length(0.9) == 256
    assert grid(((10, 20, 20), (10, 20, 20))).effective_length() == 0
    assert grid(((20, 20, 20), (20, 20, 20))).effective_length() == 1024


def test_result_comes_back_from_json(tmp_path):
    losses = (
        Measurement("perplexity", "nll", 256, 1.5, 4096, scheme="yarn"),
        Measurement("perplexity", "nll", 512, math.inf, 4096, scheme="yarn"),
        Measurement("perplexity", "final_nll", 512, math.nan, 128, scheme="yarn"),
        Measurement("perplexity", "nll_by_position", 512, 2.0, 8, positions=(0, 1), scheme="yarn"),
    )
    settings = {"evals": {"seed": 0, "zero_shot": ["yarn"]}}
    kept = Measurement("key_value", "score", 256, 0.5, 2, 0.0, scores=(1.0, 0.0), digest="00ff")
    result = EvalResult("after", 4096, 70, (*grid().rows, kept, *losses), 3.5, settings, ("Documents were joined.",))
    path = results.write(result, tmp_path / "eval" / "after.json")
    back = results.read(path)
    whole = [row for row in result.rows if not math.isnan(row.value)]
    assert [row for row in back.rows if not math.isnan(row.value)] == whole
    assert math.isnan(back.value(metric="final_nll"))
    assert perplexity(back.value(metric="nll", length=512)) == math.inf
    assert (back.settings, back.notes, back.step) == (result.settings, result.notes, 70)
    assert [p.name for p in path.parent.iterdir()] == ["after.json"]


def test_files_of_the_former_layout_are_read():
    former = {
        "label": "after", "trained": 4096, "step": 70, "seconds": 3.5, "settings": {"evals": {"seed": 0}},
        "needles": [
            {
                "lengths": [256, 512, 1024], "depths": [0.0, 1.0], "correct": [[20, 18, 2], [20, 17, 20]], "items": 20,
                "method": "teacher_forced", "scheme": "none", "trained": 256,
            },
            {"lengths": [256], "depths": [0.5], "correct": [[3]], "items": 4, "method": "generation", "scheme": "none"},
        ],
        "perplexity": [
            {
                "points": [{"length": 512, "stride": 128, "tokens": 4096, "nll": 1.5, "final_tokens": 128, "final_nll": 1.25}],
                "positions": {"length": 512, "edges": [0, 1, 512], "nll": [2.0, 1.0], "tokens": [8, 4088]},
                "bytes_per_token": 2.0, "scheme": "yarn", "trained": 256, "joined": False,
            }
        ],
    }  # fmt: skip
    found = results.from_mapping(former)
    assert found.select(task="needles").rows == grid().rows
    assert found.select(task="generated_needles").table() == [[0.75]]
    assert found.value(metric="nll", scheme="yarn", length=512) == 1.5 and found.value(metric="final_nll") == 1.25
    assert found.value(metric="bits_per_byte") == pytest.approx(1.5 / math.log(2) / 2)
    bins = found.select(metric="nll_by_position").rows
    assert [(row.positions, row.value, row.n) for row in bins] == [((0, 1), 2.0, 8), ((1, 512), 1.0, 4088)]
    assert found.settings == {"evals": {"seed": 0}} and found.step == 70


def test_wrong_files_are_answered(tmp_path):
    with pytest.raises(
        UserError, match="does not exist; `lcx run` writes eval/before.json and .* `lcx eval` writes eval/LABEL.json"
    ):
        results.read(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"label": ')
    with pytest.raises(UserError, match="cut.json is not JSON"):
        results.read(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text(json.dumps({"label": "x", "traind": 3}))
    with pytest.raises(UserError, match="did you mean 'trained'"):
        results.read(tmp_path / "other.json")
