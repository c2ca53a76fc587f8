import dataclasses
import math

import matplotlib.image
import numpy as np
import pytest

from lcx.data.report import PartReport, Report
from lcx.report import plots, style
from lcx.report.mixture_plot import mixture
from tests.report.synthetic import AFTER, AFTER_COUNTS, BEFORE, BEFORE_COUNTS, CURVES, STAGES, needles


def text_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_needles_show_every_cell_on_one_scale():
    figure = plots.needles({"before": BEFORE, "after": AFTER})
    left, right = figure.axes[:2]
    for axes, counts in ((left, BEFORE_COUNTS), (right, AFTER_COUNTS)):
        shares = 100 * np.asarray(counts) / 20
        image = axes.images[0]
        assert np.allclose(image.get_array(), shares)
        assert image.get_clim() == (0, 100)
        assert text_of(axes)[: shares.size] == [f"{x:.0f}" for x in shares.ravel()]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512", "1K", "4K"]
        assert axes.yaxis_inverted() or axes.get_ylim()[0] > axes.get_ylim()[1]  # depth 0 is at the top
    assert [label.get_text() for label in left.get_yticklabels()] == ["0%", "50%", "100%"]
    assert "trained to 256" in text_of(left) and "trained to 4K" in text_of(right)
    marks = [line.get_xdata()[0] for line in left.lines if line.get_color() == style.INK]
    assert marks == [0.5]


def test_heatmaps_and_lines_of_different_numbers_of_items_say_so():
    few = needles(((4, 3, 1, 0),) * 3, items=4, scheme="yarn")
    grids = {"before": BEFORE, "yarn": few, "ntk": few, "after": AFTER}
    figure = plots.needles(grids)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in panels] == [f"{n} items a cell" for n in (20, 4, 4, 20)]
    assert [axes.get_title(loc="left") for axes in panels] == list(grids)
    assert figure.get_supxlabel() == "context length, tokens"
    assert {axes.get_xlabel() for axes in plots.needles({"before": BEFORE, "after": AFTER}).axes} == {""}
    lines = plots.score_by_length({"unchanged": BEFORE, "yarn": few}, "needles").axes[0]
    assert set(text_of(lines)) == {"yarn (4 items)", "unchanged (20 items)"}
    assert set(text_of(plots.score_by_length({"unchanged": BEFORE, "extended": AFTER}, "needles").axes[0])) == {
        "unchanged",
        "extended",
    }


def test_many_heatmaps_stand_in_rows_in_their_order():
    figure = plots.needles({f"{i}": BEFORE for i in range(7)})
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert [(round(boxes[0].y0 - box.y0) > 0) + (round(boxes[3].y0 - box.y0) > 0) for box in boxes] == [0, 0, 0, 1, 1, 1, 2]
    assert all(left.x1 < right.x0 for row in (boxes[:3], boxes[3:6]) for left, right in zip(row, row[1:], strict=False))


def test_the_colours_are_those_of_the_field():
    corners = [matplotlib.colors.to_hex(style.SCORES(x)).upper() for x in (0.0, 1.0)]
    assert corners == ["#F0496E", "#0CD79F"]
    assert np.allclose(style.SCORES(0.5)[:3], matplotlib.colors.to_rgb("#EBB839"), atol=0.01)


def test_perplexity_lines_hold_the_data_and_their_names():
    axes = plots.perplexity(CURVES, trained=256).axes[0]
    for curve in CURVES.values():
        wanted = [math.exp(nll) for nll in curve.select(metric="nll").by_length().values()]
        assert any(len(line.get_ydata()) == 4 and np.allclose(line.get_ydata(), wanted) for line in axes.lines)
    assert set(CURVES) <= set(text_of(axes)) and "base trained at 256" in text_of(axes)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [f"{x:.0f}" for x in axes.get_xticks()] == ["256", "512", "1024", "4096"]
    final = plots.perplexity(CURVES, final=True).axes[0]
    assert any(np.allclose(line.get_ydata()[0], math.exp(math.log(4.25) - 0.1)) for line in final.lines)


def test_infinite_perplexity_is_left_out():
    *others, last = CURVES["unchanged"].select(metric="nll").rows
    broken = dataclasses.replace(CURVES["unchanged"], rows=(*others, dataclasses.replace(last, value=math.inf)))
    axes = plots.perplexity({"unchanged": broken}).axes[0]
    assert len(axes.lines[0].get_ydata()) == 3


def test_positions_are_drawn_where_they_are():
    axes = plots.positions(CURVES, 256).axes[0]
    x, y = axes.lines[0].get_data()
    assert np.allclose(y, (2.0, 1.5, 1.25, math.log(467.0)))
    assert all(a < b for a, b in zip(x, x[1:], strict=False)) and 256 < x[-1] < 4096


def test_a_mixture_is_drawn_as_it_was_counted():
    counted = [("code", (3, 1, 0), (90, 80, 0), 170), ("needles", (0, 0, 5), (0, 0, 330), 330)]
    parts = tuple(
        PartReport(name, "text", "a corpus", 4, 500, tokens, 0, 0.0, sum(documents), documents, by_length, 9, 5, 4, 500, ())
        for name, documents, by_length, tokens in counted
    )
    left, middle, right = mixture(Report(128, (1, 64, 128, 256), parts)).axes
    for axes, which in ((left, 1), (middle, 2)):
        heights = [bar.get_height() for bars in axes.containers for bar in bars]
        assert heights == [*counted[0][which], *counted[1][which]]
        # Ticks stand where one bar ends and the next begins: the first bar is of documents below 64 tokens.
        assert [(tick.get_position()[0], tick.get_text()) for tick in axes.get_xticklabels()] == [(0.5, "64"), (1.5, "128")]
        assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in axes.containers[0]] == [0, 1, 2]
        assert axes.get_ylim()[1] > 1.05 * max(bar.get_y() + bar.get_height() for bars in axes.containers for bar in bars)
        assert axes.get_xlabel() == "length of the document, tokens"
    assert text_of(right) == ["34.0%", "66.0%"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["code", "needles"]
    assert right.get_xlabel() == "rows of 128, 50.0% filled"


def test_losses_by_stage():
    axes = plots.losses(STAGES).axes[0]
    raw = [line for line in axes.lines if line.get_alpha() is not None]
    assert [tuple(line.get_ydata()) for line in raw] == [stage.loss for stage in STAGES]
    assert [line.get_color() for line in raw] == [style.LINES[0], style.MUTED, style.LINES[0]]
    assert text_of(axes) == ["256\nθ 500", "4K\nθ 31K"]
    gaps = (dataclasses.replace(STAGES[0], loss=(math.nan, math.inf, *STAGES[0].loss[2:])),)
    assert len(plots.losses(gaps).axes[0].lines[0].get_ydata()) == 38


@pytest.mark.parametrize("window", [1, 3, 50])
def test_smoothing_keeps_straight_lines_and_means(window):
    flat = plots._smooth(np.full(20, 3.0), window)
    assert np.allclose(flat, 3)
    line = plots._smooth(np.arange(20.0), window)
    middle = slice(0, max(1, 20 - window))
    assert np.allclose(line[middle], np.arange(20.0)[middle])


def test_pictures_are_written(tmp_path):
    figures = {
        "needles": plots.needles({"after": AFTER}),
        "perplexity": plots.perplexity(CURVES, 256),
        "losses": plots.losses(STAGES),
        "summary": plots.summary(BEFORE, AFTER, CURVES, STAGES),
        "bare": plots.summary(BEFORE, AFTER, {}, ()),
    }
    for name, figure in figures.items():
        pixels = matplotlib.image.imread(style.save(figure, tmp_path / f"{name}.png"))
        assert pixels.shape[1] >= 1200 and pixels[:, :, :3].std() > 0.02
