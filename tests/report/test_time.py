import itertools

import matplotlib.colors
import matplotlib.text
import pytest

from lcx.report import time
from lcx.training.goodput import PARTS, Goodput

EVERY = dict(zip(PARTS, (600, 5, 80, 6, 200, 2, 10, 9, 0.04, 70, 14), strict=True))


@pytest.mark.parametrize(
    "parts", [EVERY, dict(itertools.islice(EVERY.items(), 1)), {"step": 90.0, "report": 10.0, "program_startup": 1}]
)
def test_every_piece_of_the_bar_is_named_where_it_can_be_read(parts):
    figure = time.bar(Goodput(parts, sum(parts.values()), 0.0, 1, (), 0))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_title(loc="left").startswith("Where the time went: ")
    assert sorted(text.get_text().split("\n")[0] for text in axes.texts) == sorted(time.SHORT[part] for part in parts)
    pieces = {bar.get_facecolor(): bar.get_window_extent() for bar in axes.patches}
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for text, box in zip(axes.texts, boxes, strict=True):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= axes.get_window_extent().y1
        if getattr(text, "arrow_patch", None):  # above the bar, led to its piece
            piece = pieces[matplotlib.colors.to_rgba(text.get_color())]
            at = axes.transData.transform(text.xy)
            assert box.y0 > piece.y1 - 1 and piece.x0 - 1 <= at[0] <= piece.x1 + 1
        else:
            assert any(piece.x0 < box.x0 and box.x1 < piece.x1 for piece in pieces.values())


def test_small_shares_are_not_rounded_to_nothing():
    words = [text.get_text() for text in time.bar(Goodput(EVERY, sum(EVERY.values()), 0.0, 1, (), 0)).axes[0].texts]
    assert {"steps\n60%", "data\n0.5%", "start\n1%", "restore\n<0.1%", "lost work\n7%"} <= set(words)
