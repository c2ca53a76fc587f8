import pytest

from lcx.cli.compare import tally


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["better"] * 3, "3 compared: 3 better, 0 worse"),
        (["better", "equal", "worse", "equal"], "4 compared: 1 better, 1 worse, 2 equal within 95%"),
        (["unknown", "better"], "2 compared: 1 better, 0 worse, 1 of a single item, which shows nothing"),
        (["equal"], "1 compared: 0 better, 0 worse, 1 equal within 95%"),
    ],
)
def test_only_what_there_is_is_counted(verdicts, said):
    assert tally(verdicts) == said
