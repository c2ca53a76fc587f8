"""The file of answers: a damaged line is named, and one that a kill cut off is asked for again."""

import pytest

from lcx.core.errors import UserError
from lcx.evals.answers import AnswerLog


@pytest.mark.parametrize("damaged", ["garbage{", "5", '{"no": "key"}'])
def test_a_damaged_line_is_named(damaged, tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, "one").add("a", score=1.0)
    path.write_text(path.read_text() + f"{damaged}\n")
    with pytest.raises(UserError, match="answers.jsonl: line 2 is damaged; delete it, and what it held is asked for again"):
        AnswerLog(path)


def test_a_line_that_was_cut_off_is_dropped(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    AnswerLog(path, "one").add("a", score=1.0)
    whole = path.read_text()
    path.write_text(whole + '{"key": "b", "sc')
    log = AnswerLog(path)
    assert log.known("a") is not None and log.known("b") is None and path.read_text() == whole
    assert "ends in the middle of an answer" in capsys.readouterr().err
