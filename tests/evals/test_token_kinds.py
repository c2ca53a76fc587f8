import numpy as np
import pytest

from lcx.data.tokenizers.stream import pieces
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals.text.token_kinds import COPIES, KINDS, copies, kinds


def named(units: list[str]) -> list[str]:
    return [KINDS[i] for i in kinds(units)]


@pytest.mark.parametrize(
    ("units", "wanted"),
    [
        (["The", " cat", " sat", "."], ["word", "word", "word", "symbol"]),
        (["He", " met", " Mary", " Smith", "'s", " dog"], ["word", "word", "name", "name", "name", "word"]),
        (["End", ".", " Then", " it"], ["word", "symbol", "word", "word"]),
        (["In", " 18", "48", ",", " 3", "rd"], ["word", "number", "number", "symbol", "number", "number"]),
        (["def", " my", "_fun", "(x", ")"], ["word", "code", "code", "symbol", "symbol"]),
        (["get", "Value", " x1", " ="], ["code", "code", "code", "code"]),
        (["a", "\n\n", "I", " am", " Tom"], ["word", "space", "word", "word", "name"]),
        (["well", "-known", " O'Neil"], ["word", "word", "name"]),
        (["", "", "é", " a"], ["space", "space", "word", "word"]),
    ],
)
def test_kinds_of_tokens(units, wanted):
    assert named(units) == wanted


def test_kinds_do_not_depend_on_how_text_is_cut():
    text = 'In 1848 Anna Karenina wrote my_function(x1) twice. She was 27; he said: "No, Peter." naïve café\n'
    by_byte = kinds(pieces(Bytes(), Bytes().encode(text)))
    by_character = kinds(list(text))
    ends = np.cumsum([len(c.encode()) for c in text]) - 1
    spaces = np.array([c.isspace() for c in text])
    assert np.array_equal(by_byte[ends][~spaces], by_character[~spaces])
    assert {KINDS[i] for i in by_character} == set(KINDS)


def test_copies_say_how_far_back_the_last_occurrence_is():
    rng = np.random.default_rng(0)
    passage, gap, far = rng.integers(0, 9999, 12), rng.integers(10000, 19999, 6), rng.integers(20000, 29999, 60)
    row = np.concatenate([passage, gap, passage, far, passage])
    found = copies(row, bytes_per_token=4.0, near=40)
    # Four tokens are sixteen bytes: the first three of a repeated passage are not known to be copied yet.
    names = [COPIES[i] for i in found]
    assert names[:18] == ["new"] * 18
    assert names[18:30] == ["new"] * 3 + ["copied_near"] * 9
    assert names[30:90] == ["new"] * 60
    assert names[90:] == ["new"] * 3 + ["copied_far"] * 9


def test_texts_of_tokens_add_up(tmp_path):
    text = "naïve – 漢字 ok"
    tokens = Bytes().encode(text)
    found = pieces(Bytes(), tokens)
    assert "".join(found) == text and len(found) == len(tokens) and found[2] == "" and found[3] == "ï"
    assert pieces(Bytes(), tokens[:0]) == []
