import itertools

import matplotlib.colors
import matplotlib.text
import numpy as np
import pytest

from lcx.report import style


@pytest.mark.parametrize(
    ("length", "text"), [(64, "64"), (1000, "1,000"), (1024, "1K"), (1536, "1,536"), (32768, "32K"), (2**20, "1M"), (2**22, "4M")]
)
def test_lengths_as_people_say_them(length, text):
    assert style.tokens(length) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (4.312, "4.31"), (467.4, "467"), (4500, "4,500"), (31_250, "31.2K"), (15.3e6, "15.3M"), (3.58e9, "3.58B"),
     (45.2e9, "45.2B"), (999.6, "1,000"), (0.0, "0"), (-12.5, "-12.5")],
)  # fmt: skip
def test_numbers_stay_short(value, text):
    assert style.number(value) == text


def test_labels_are_pushed_apart_no_more_than_needed():
    wanted = [0.1, 0.5, 0.52, 0.53, 0.9]
    placed = style.spread(wanted, 0.06)
    assert np.all(np.diff(placed) >= 0.06 - 1e-12)
    assert placed[0] == pytest.approx(0.1) and placed[-1] == pytest.approx(0.9)
    assert np.mean(placed[1:4]) == pytest.approx(np.mean(wanted[1:4]))
    assert style.spread([], 0.1) == []
    assert style.spread([0.3, 0.3], 0.1) == pytest.approx([0.25, 0.35])
    assert style.spread([0.0, 0.01, 0.97, 0.98], 0.1) == pytest.approx([0.0, 0.1, 0.9, 1.0])
    assert style.spread([0.0, 0.01, 0.97, 0.98], 0.1, 0.05) == pytest.approx([0.05, 0.15, 0.85, 0.95])


@pytest.mark.parametrize(("right", "log"), [(8, False), (8, True), (12, False)])
@pytest.mark.parametrize("heights", [(1, 1, 1.02, 9.9, 10), (2, 4, 6, 8), (9.6, 9.7, 9.8, 9.9, 10)])
def test_names_of_lines_stay_in_the_frame_and_are_led_to_if_moved(heights, right, log):
    figure = style.new_figure(9.0, 4.2)
    axes = figure.subplots()
    axes.set_ylim(1, 10)
    axes.set_xlim(2, right)
    if log:
        axes.set_yscale("log")
    style.end_labels(axes, [(8.0, y, f"line {i}", style.LINES[i % 8]) for i, y in enumerate(heights)])
    figure.draw_without_rendering()
    frame, moved = axes.get_window_extent(), heights != (2, 4, 6, 8)
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
    assert min(box.x0 for box in boxes) > frame.x1 and len({box.x0 for box in boxes}) == 1
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    for text, y in zip(axes.texts, heights, strict=True):
        assert text.xy == (8.0, y)
        assert (text.arrow_patch is not None) == moved
        if moved:
            assert matplotlib.colors.same_color(text.arrow_patch.get_edgecolor(), text.get_color())
        else:
            assert text.get_window_extent().y0 < axes.transData.transform(text.xy)[1] < text.get_window_extent().y1


def test_rc_settings_do_not_leak():
    import matplotlib

    before = matplotlib.rcParams["axes.titleweight"]
    with style.typography():
        assert matplotlib.rcParams["axes.titleweight"] == "bold"
    assert matplotlib.rcParams["axes.titleweight"] == before
