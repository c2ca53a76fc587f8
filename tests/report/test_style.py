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


def test_rc_settings_do_not_leak():
    import matplotlib

    before = matplotlib.rcParams["axes.titleweight"]
    with style.typography():
        assert matplotlib.rcParams["axes.titleweight"] == "bold"
    assert matplotlib.rcParams["axes.titleweight"] == before
