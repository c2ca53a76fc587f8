import math

import pytest

from lcx.evals.results import EvalResult, Measurement
from lcx.report import likelihood, style

LENGTHS = (256, 1024, 4096)
LOSSES = {"word": (2.0, 1.9, 1.8), "number": (4.0, 3.9, 3.95), "space": (0.05, 0.05, 0.05), "copied_far": (1.5, 1.3, 1.0)}


def kinds(trained: int, worse: float, names=tuple(LOSSES), schemes=("none",)) -> EvalResult:
    rows = (
        Measurement(f"loss_by_kind_{name}", "nll", length, loss + worse + 0.1 * i, 100, scheme=scheme)
        for i, scheme in enumerate(schemes)
        for name in names
        for length, loss in zip(LENGTHS, LOSSES[name], strict=True)
    )
    return EvalResult("kinds", trained, rows=tuple(rows))


BEFORE = kinds(256, 0.3, schemes=("none", "yarn", "rope:theta=critical"))


@pytest.mark.parametrize(
    ("before", "titles"),
    [(BEFORE, ["before", "yarn", "theta raised", "after"]), (kinds(256, 0.3), ["before", "after"]), (None, [])],
)
def test_each_kind_has_a_panel_with_every_curve(before, titles):
    figure = likelihood.kinds(before, kinds(4096, 0.0))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["word", "number", "space", "copied far"]
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == titles
    for axes, losses in zip(panels, LOSSES.values(), strict=True):
        drawn = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert list(drawn) == (titles or ["after"])
        assert list(drawn["after"].get_ydata()) == list(losses) and drawn["after"].get_color() == style.AFTER
        ends = {text.get_text() for text in axes.texts}
        assert ends == {f"{losses[-1]:.2f}"} | ({f"{losses[-1] + 0.3:.2f}"} if titles else set())
        low, high = axes.get_ylim()
        assert low >= 0 and all(low <= y <= high for line in axes.lines for y in line.get_ydata())
    assert max(axes.get_ylim()[1] - axes.get_ylim()[0] for axes in panels) == pytest.approx(
        min(axes.get_ylim()[1] - axes.get_ylim()[0] for axes in panels)
    )


def test_kinds_that_one_model_lacks_and_infinite_losses_are_left_out():
    lost = Measurement("loss_by_kind_word", "nll", 8192, math.inf, 100)
    before = EvalResult("kinds", 256, rows=(*kinds(256, 0.3, names=("word",)).rows, lost))
    figure = likelihood.kinds(before, kinds(4096, 0.0))
    word, number = figure.axes[:2]
    assert [len(word.texts), len(number.texts)] == [2, 1]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["256", "1K", "4K"]
    assert likelihood.kinds(None, EvalResult("kinds", 256)) is None
