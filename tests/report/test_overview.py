"""One picture of results: which one, and under which titles."""

import dataclasses

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.evals.results import EvalResult, Measurement
from lcx.report.overview import overview
from tests.report.synthetic import AFTER, BEFORE, BEFORE_COUNTS, CURVES


def scores(task, *values):
    lengths = (1024, 2048, 4096)
    return tuple(Measurement(task, "score", n, value, 4) for n, value in zip(lengths, values, strict=True))


def titles(figure):
    return [title for axes in figure.axes if (title := axes.get_title(loc="left") or axes.get_title())]


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_depths_make_a_heatmap():
    figure = overview([BEFORE, AFTER])
    assert titles(figure)[:2] == ["needles, trained to 256", "needles, trained to 4,096"]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), 100 * np.asarray(BEFORE_COUNTS) / 20)
    assert titles(overview({"one": BEFORE, "other": AFTER}))[:2] == ["one", "other"]
    assert titles(overview([BEFORE, BEFORE]))[:2] == ["needles, trained to 256 (1)", "needles, trained to 256 (2)"]


def test_schemes_are_drawn_apart():
    tried = tuple(dataclasses.replace(row, scheme="yarn") for row in BEFORE.rows)
    figure = overview(dataclasses.replace(BEFORE, rows=BEFORE.rows + tried))
    assert titles(figure)[:2] == ["needles", "needles, yarn"]


def test_scores_without_depths_are_lines():
    one, other = scores("qa", 0.9, 0.5, 0.1), scores("qa", 0.8, 0.7, 0.6)
    figure = overview([EvalResult("a", 1024, rows=one), EvalResult("b", 4096, rows=other)])
    first, second = figure.axes[0].lines[:2]
    assert first.get_ydata().tolist() == [0.9, 0.5, 0.1] and second.get_ydata().tolist() == [0.8, 0.7, 0.6]
    assert {"a", "b"} <= set(words(figure)) and titles(figure) == ["qa: score by length"]


def test_several_tasks_are_a_table():
    found = EvalResult("a", 1024, rows=(*scores("qa", 0.9, 0.5, 0.1), *scores("copying", 1.0, 1.0, 0.0)))
    figure = overview(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["qa", "copying"]
    assert words(figure)[:3] == ["90", "50", "10"]
    assert titles(overview(found, task="copying")) == ["copying: score by length"]


def test_losses_are_perplexity():
    figure = overview(CURVES["extended"])
    assert titles(figure) == ["Held-out perplexity"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), (4.0, 3.75, 3.5, 3.25))


def test_nothing_to_draw():
    with pytest.raises(UserError, match="did you mean 'needles'"):
        overview(BEFORE, task="needle")
    with pytest.raises(UserError, match="a has neither scores nor perplexity to draw"):
        overview(EvalResult("a", 1, rows=(Measurement("ruler", "empty", 4, 0.0, 1),)))
