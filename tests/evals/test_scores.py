"""How published benchmarks score: at least five written cases for each function."""

import inspect
import sys

import pytest

from lcx.core.errors import UserError
from lcx.evals.readers import final_answers, scores

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
    "named": [
        ("It was Yuki.", ["Yuki"], 1),
        ("it was yuki", ["Yuki"], 0),
        ("", ["Yuki"], 0),
        ("Ann or Bob", ["Bob", "Cleo"], 1),
        ("Bobby", ["Bob"], 1),
        ("B o b", ["Bob"], 0),
    ],
    "folded_f1": [
        ("José Nuñez", ["Jose Nunez"], 1),
        ("Jose", ["José Nuñez"], 2 / 3),
        ("", ["José"], 0),
        ("The café!", ["tea", "CAFE"], 1),
        ("Zürich", ["Zurich"], 1),
        ("Bern", ["Zürich"], 0),
    ],
    "rouge_l": [
        ("a b c", ["a b c"], 1),
        ("a x c", ["a b c"], 2 / 3),
        ("c b a", ["a b c"], 1 / 3),
        ("", ["a b"], 0),
        ("a b", ["a b c d"], 2 / 3),
        ("a b", ["x", "a b"], 1),
        ("A b", ["a b"], 1 / 2),
        # The same word twice counts once, and sentences match in any order.
        ("a a b", ["a b b"], 1),
        ("c d. a b", ["a b. c d"], 1),
        ("b.", ["."], 0),
    ],
    "rouge_l_sum": [
        ("A b c.", ["a b c"], 1),
        ("a x c", ["a b c"], 2 / 3),
        ("", ["a b"], 0),
        ("x", ["a b"], 0),
        ("a b", ["x y", "b a b"], 4 / 5),
        ("c d\na b", ["a b\nc d"], 1),
    ],
    "rouge_mean": [
        ("The cat sat.", ["the cat sat"], 1),
        ("", ["the cat"], 0),
        ("cat the", ["the cat"], 0),
        # F of ROUGE-1 and -L is 2/3, of ROUGE-2 1/2.
        ("a b x", ["a b y"], (2 / 3 * 1 / 2 * 2 / 3) ** (1 / 3)),
        ("a b", ["x y", "A, b!"], 1),
        # Each kind is the best of the references: ROUGE-1 of the second, ROUGE-2 of the first.
        ("a b c d", ["a b", "d c b a"], (1 * 1 / 2 * 2 / 3) ** (1 / 3)),
    ],
    "first_choice": [
        ("B", ["(B) a house"], 1),
        ("The answer is (C).", ["C"], 1),
        ("A or B", ["B"], 0),
        ("Because", ["B"], 0),
        ("", ["B"], 0),
        ("b", ["B"], 0),
    ],
    "initial_choice": [
        ("B", ["B"], 1),
        (" b. Because", ["B"], 1),
        ("The answer is B", ["B"], 0),
        ("", ["B"], 0),
        ("[B]", ["B"], 0),
        ("Bananas", ["B"], 1),
    ],
    "same_text": [
        ("1964.", ["1964"], 1),
        (" Janet Finch AM", ["janet finch am"], 1),
        ("in 1964", ["1964"], 0),
        ("", ["1964"], 0),
        ("1964\n", ["1964."], 1),
        ("1,964", ["1964"], 0),
    ],
    "yes_or_no": [
        ("Yes.", ["Yes"], 1),
        ("no", ["No"], 1),
        ("  YES", ["No"], 0),
        ("", ["Yes"], 0),
        ("", ["No"], 1),
        ("I say yes", ["Yes"], 0),
    ],
    "concordance": [
        ("[2] > [0] > [1]", ["2", "0", "1"], 1),
        ("[1] > [0] > [2]", ["2", "0", "1"], 0),
        ("3, 1, 2", ["2", "0", "1"], 1),
        ("2, 1, 0", ["2", "0", "1"], 2 / 3),
        ("2 > 0", ["2", "0", "1"], 0),
        ("", ["2", "0", "1"], 0),
        ("2 2 2", ["2", "0", "1"], 0),
    ],
    "concordance_of_permutation": [
        ("3, 1, 2", ["3", "1", "2"], 1),
        ("Order: 1,3,2.", ["3", "1", "2"], 2 / 3),
        ("2, 1, 3", ["3", "1", "2"], 0),
        ("3, 1", ["3", "1", "2"], 0),
        ("3, 3, 2", ["3", "1", "2"], 0),
        ("", ["3", "1", "2"], 0),
        ("3 > 1 > 2", ["3", "1", "2"], 0),
    ],
    "near_percentage": [
        ("40%", ["40%"], 1),
        ("so 50 % of them, not 10%", ["40%"], 0.5),
        ("20%", ["40%"], 0.25),
        ("40", ["40%"], 0),
        ("", ["40%"], 0),
        ("37.5%", ["40%"], 2**-0.25),
    ],
    "labelled": [
        (" 12", ["12"], 1),
        ("label: 12\nlabel: 3", ["12"], 1),
        ("So.\nLabel: 12", ["12"], 1),
        ("112", ["12"], 0),
        ("", ["12"], 0),
        ("12 or 13", ["12"], 0),
        ("12\n13", ["12"], 1),
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


FINAL_ANSWERS = {
    "exam_match": [
        ("The future of space tourism.", ["The Future of Space Tourism"], 1),
        ("12.0", ["12"], 1),
        ("", ["topic"], 0),
        ("112", ["12"], 0),
        ("it is 12", ["12"], 1),
        ("space", ["space tourism"], 0),
    ],
    "one_option": [
        ("B", ["B"], 1),
        ("answer: (C)", ["(C) a long way"], 1),
        ("b", ["B"], 0),
        ("", ["A"], 0),
        ("Because of C", ["C"], 0),
        ("no", ["A"], 0),
        ("CD", ["C"], 0),
        ("C, not D", ["C"], 1),
    ],
    "options": [
        ("BD", ["BD"], 1),
        ("DB", ["BD"], 1),
        ("B", ["BD"], 0.25),
        ("BC", ["BD"], 0),
        ("", ["A"], 0),
        ("B. this\nD. that\nQuestion A.", ["BD"], 1),
        ("answer: BD", ["BD"], 1),
        ("none", ["A"], 0),
        ("ABCD", ["AB"], 0),
    ],
    "solved_number": [
        ("So 3 + 4 = 7.\nThe answer is 7", ["7"], 1),
        ("It costs $1,250.50 in all", ["1250"], 1),
        ("The answer is 8\n\nQuestion: The answer is 7", ["7"], 0),
        ("First 7\n\nthen 9", ["7"], 1),
        ("", ["7"], 0),
        ("seven", ["7"], 0),
        ("17", ["7"], 0),
    ],
    "code_output": [
        ("The output will be [1, 2]", ["[1, 2]"], 1),
        ("so the final output is 5. It printed 7 before", ["5"], 1),
        ("7 and then the value of x is 5", ["5"], 1),
        ("", ["5"], 0),
        ("5 was long ago, before all the others came", ["5"], 0),
        ("2.0", ["2"], 1),
    ],
    "judged_twice": [
        ("True [fact: False]", ["True [fact: False]"], 1),
        ("false [FACT: false]", ["True [fact: False]"], 0.5),
        ("True", ["True [fact: False]"], 0.5),
        ("", ["True [fact: False]"], 0),
        ("It is true. [fact: it is true]", ["True [fact: False]"], 0.5),
        ("False or True [fact: True]", ["True [fact: False]"], 0),
    ],
    "boxed": [
        (r"so \boxed{12}", ["12"], 1),
        (r"\boxed{14}", ["12"], 0.75**2),
        (r"\boxed{\text{Fire Bolt}}", ["fire bolt"], 1),
        (r"\boxed{Ann, Bob}", ["Ann, Bob, Cleo, Dan"], 1 / 2),
        (r"\boxed{Ann}", ["Ann, Bob"], 0),
        (r"\boxed{twelve}", ["12"], 0),
        ("12", ["12"], 1),
        ("", ["12"], 0),
    ],
}
CASES_OF = [(scores, CASES), (final_answers, FINAL_ANSWERS)]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for _, table in CASES_OF for name, cases in table.items() for case in cases], ids=str
)
def test_scores(name, case):
    prediction, references, expected = case
    module = scores if name in CASES else final_answers
    assert getattr(module, name)(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_model_that_repeats_a_digit_is_wrong(digits):
    said = "7" * digits
    assert final_answers.counted_up(f"Answer: {said}", ["5"], "ANSWER_TYPE.NUMERIC") == 0
    assert final_answers.boxed(rf"\boxed{{-{said}}}", ["5"]) == 0
    assert final_answers.solved_number(f"The answer is {said}", ["7"]) == 0
    assert scores.concordance_of_permutation(f"1, {said}", ["1", "2"]) == scores.concordance(f"{said}, 1", ["1", "2"]) == 0


@pytest.mark.parametrize("module", [scores, final_answers], ids=["scores", "final_answers"])
def test_every_score_has_five_cases(module):
    table = dict(CASES_OF)[module]
    apart = {"classification", "only_label", "chinese_f1", "chinese_rouge_l", "yes_metrics", "of_first_line", "counted_up"}
    found = {name for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__}
    wanted = {name for name in found if not name.startswith("_")} - apart - {"normalized"}
    assert wanted == set(table) and all(len(cases) >= 5 for cases in table.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The Cat!", "cat"), ("", ""), ("a an the", ""), ("  U.S.A \n now", "usa now"), ("Then, another", "then another")],
)
def test_normalized(text, expected):
    assert scores.normalized(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "kind", "expected"),
    [
        ("Label: ham", ["ham"], "LABEL", 1),
        ("I counted.\n**Answer: [5]**", ["5"], "NUMERIC", 1),
        ("Answer: 7", ["5"], "NUMERIC", 0.75**2),
        ("Answer: many", ["5"], "NUMERIC", 0),
        ("Answer: Ham", ["ham"], "LABEL", 0),
        ("", ["5"], "NUMERIC", 0),
        ("", ["ham"], "LABEL", 0),
        ("ham", ["ham"], "LABEL", 1),
        ("after a lot of counting it is 5", ["5"], "NUMERIC", 1),
        ("Answer: ham is more common than spam here", ["more common than"], "COMPARISON", 1),
        ("Answer: ham is less common than spam here", ["more common than"], "COMPARISON", 0),
        ("Date: January 5, 2023", ["2023-01-05"], "DATE", 1),
        ("Date: 2023-01-06", ["2023-01-05"], "DATE", 0),
        ("Date: unknown", ["2023-01-05"], "DATE", 0),
    ],
)
def test_counted_up(prediction, references, kind, expected):
    assert final_answers.counted_up(prediction, references, f"ANSWER_TYPE.{kind}") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("references", "found", "expected"),
    [
        (["Yes", "Yes", "No"], [1, 0, 1], (1, 1 / 2, 2 / 3)),
        (["Yes", "No"], [1, 0], (1 / 2, 1, 2 / 3)),
        (["No", "No"], [1, 1], (0, 0, 0)),
        (["Yes"], [0], (0, 0, 0)),
        (["Yes", "No"], [1, 1], (1, 1, 1)),
        ([], [], (0, 0, 0)),
    ],
)
def test_yes_metrics(references, found, expected):
    made = scores.yes_metrics([[reference] for reference in references], found)
    assert tuple(made) == ("precision", "recall", "f1") and tuple(made.values()) == pytest.approx(expected)


@pytest.mark.parametrize(("prediction", "expected"), [("cat\ndog", 1), ("\n\ncat", 1), ("dog\ncat", 0), ("", 0), ("The cat.\n", 1)])
def test_of_first_line(prediction, expected):
    assert scores.of_first_line(scores.exact_match)(prediction, ["cat"]) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "rouge"),
    [
        ("北京", ["北京"], 1, 1),
        ("首都是北京。", ["北京"], 1 / 2, 2 / 5),
        ("", ["北京"], 0, 0),
        ("上海", ["北京"], 0, 0),
        ("北京！", ["上海", "北京"], 1, 2 / 3),
        ("ABC", ["abc"], 1, 0),
    ],
)
def test_chinese_scores(prediction, references, f1, rouge):
    pytest.importorskip("jieba", reason="the extra suites")
    assert scores.chinese_f1(prediction, references) == pytest.approx(f1)
    assert scores.chinese_rouge_l(prediction, references) == pytest.approx(rouge)


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


@pytest.mark.parametrize(
    ("score", "missing", "what"),
    [
        ("chinese_f1", "jieba", "a Chinese dataset"),
        ("chinese_rouge_l", "jieba", "a Chinese dataset"),
        ("rouge_mean", "rouge_score", "a dataset of summaries"),
        ("rouge_l_sum", "rouge_score", "a dataset of summaries"),
    ],
)
def test_a_missing_library_is_named(score, missing, what, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{what} needs the {missing} library; install the extra: pip install -e '.\[suites\]'"):
        getattr(scores, score)("a", ["a"])
