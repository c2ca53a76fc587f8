"""How published benchmarks score: at least five written cases for each function."""

import pytest

from lcx.core.errors import UserError
from lcx.evals.readers import scores

CASES = {
    "token_f1": [
        ("The Eiffel Tower!", ["eiffel tower"], 1),
        ("in Paris, France", ["Paris"], 0.5),
        ("", ["Paris"], 0),
        ("London", ["Paris", "london town"], 2 / 3),
        ("an a the", ["the"], 0),
        ("Paris Paris", ["Paris"], 2 / 3),
    ],
    "exact_match": [
        ("The cat.", ["cat"], 1),
        ("a cat", ["dog", "cat"], 1),
        ("cats", ["cat"], 0),
        ("", ["cat"], 0),
        ("THE  Cat", ["a cat"], 1),
    ],
    "contained": [
        ("It is the Nile.", ["nile"], 1),
        ("Nil", ["nile"], 0),
        ("", ["nile"], 0),
        ("amazon or nile", ["Po", "Nile"], 1),
        ("the U.S.A", ["USA"], 1),
    ],
    "rouge_l": [
        ("a b c", ["a b c"], 1),
        ("a x c", ["a b c"], 2 / 3),
        ("c b a", ["a b c"], 1 / 3),
        ("", ["a b"], 0),
        ("a b", ["a b c d"], 2 / 3),
    ],
    "share_of_numbers": [
        ("Paragraph 12", ["Paragraph 12"], 1),
        ("12 or 13", ["Paragraph 12"], 0.5),
        ("none", ["Paragraph 12"], 0),
        ("112", ["12"], 0),
        ("3 3 4", ["3"], 2 / 3),
    ],
    "code_similarity": [
        ("x = 1", ["x = 1"], 1),
        ("# comment\nx = 1", ["x = 1"], 1),
        ("```python\nx = 1\n```", ["x = 1"], 1),
        ("", ["x = 1"], 0),
        ("\n\nx = 2", ["x = 1"], 0.8),
        ("// only", ["x"], 0),
    ],
    "choice_of_four": [
        ("The correct answer is (B).", ["B"], 1),
        ("**The correct answer is B**", ["B"], 1),
        ("The correct answer is (C)", ["B"], 0),
        ("B", ["B"], 0),
        ("the correct answer is (B)", ["B"], 0),
        ("", ["B"], 0),
    ],
    "leading_choice": [
        ("B. Because", ["B"], 1),
        ("The answer is C", ["B"], 0),
        ("A man", ["B"], 0),
        ("Blue sky", ["B", "Blue"], 1),
        ("", ["B"], 0),
    ],
    "repeated_turn": [
        ("xyz hello", ["xyz", "xyz hello"], 1),
        ("hello", ["xyz", "xyz hello"], 0),
        (" xyz hello", ["xyz", "xyz hello"], 0),
        ("xyz", ["xyz", "xyz hello"], 0),
        ("xyzab", ["xyz", "xyzabcd"], 2 / 3),
    ],
    "final_list_f1": [
        ("so\nFinal Answer: [a, b]", ["a", "b"], 1),
        ("Final Answer: [a, c]", ["a", "b"], 0.5),
        ("Final Answer: []", [], 1),
        ("Final Answer: []", ["a"], 0),
        ("Final Answer: [a]\nDone.", ["a"], 0),
        ("[a]", ["a"], 0),
    ],
    "first_number": [
        ("The key is 123.", ["123"], 1),
        ("1234", ["123"], 0),
        ("12 123", ["123"], 0),
        ("", ["123"], 0),
        ("0123", ["123"], 0),
    ],
    "word_among": [
        ('"ab-1"', ["ab-1"], 1),
        ("value: ab-1.", ["ab-1"], 1),
        ("xab-1", ["ab-1"], 0),
        ("", ["ab-1"], 0),
        ("a, b", ["b"], 1),
    ],
    "last_word": [
        ("it returns 7", ["7"], 1),
        ("7.", ["7"], 1),
        ("7 or 8", ["7"], 0),
        ("", ["7"], 0),
        ("-7", ["7"], 0),
    ],
    "name_among": [
        ("It was Anna.", ["ANNA"], 1),
        ("Annabel", ["ANNA"], 0),
        ("", ["ANNA"], 0),
        ("bob, anna", ["Bob"], 1),
        ("O'Neil", ["O'NEIL"], 1),
    ],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases], ids=str)
def test_scores(name, case):
    prediction, references, expected = case
    assert getattr(scores, name)(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Sport", 1), ("Sport or Art", 0.5), ("Art", 0), ("", 0), ("Water Sport", 1)],
)
def test_classification(prediction, expected):
    # "Sport" stands in "Water Sport", and does not count against it.
    reference = ["Water Sport"] if prediction.startswith("Water") else ["Sport"]
    assert scores.classification(prediction, reference, ["Sport", "Art", "Water Sport"]) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The kitchen.", ["kitchen"], 1),
        ("kitchen, garden", ["kitchen"], 0),
        ("milk, apple", ["apple,milk"], 1),
        ("The office kitchen", ["kitchen"], 1),
        ("", ["kitchen"], 0),
    ],
)
def test_only_label(prediction, references, expected):
    labels = ("kitchen", "garden", "office", "milk", "apple")
    assert scores.only_label(prediction, references, labels, "Where before the office?") == expected


def test_a_missing_library_is_named():
    with pytest.raises(
        UserError, match=r"a Chinese dataset needs the jieba library; install the extra: pip install -e '.\[suites\]'"
    ):
        scores.chinese_f1("a", ["a"])
