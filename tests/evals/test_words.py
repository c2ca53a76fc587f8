"""Every benchmark in words: what readers of all, of part and of nothing score, and how full its prompts are."""

import random
import re

import numpy as np
import pytest

from lcx.data.config import DataConfig
from lcx.data.tokenizers import tokenizers
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Materials
from lcx.evals.config import EvalConfig
from lcx.evals.statistics import interval
from lcx.evals.tasks.table import GROUPS, TASKS, WORDS
from lcx.evals.text.matching import edits, first_integer, integers, last_list, set_f1, word_error_rate
from lcx.report.question_plots import COUNTED
from tests.evals.text_cases import Reader, bpe, pieces, task

OTHERS = tuple(name for name in WORDS if name not in GROUPS["ruler"])
AT_DEPTHS = ("needle_in_prose", "single_needle_in_prose", "passkey", "key_value", "json_kv", "infinitebench_number")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Tokenizers by name: a byte-level BPE, and SentencePiece with begin-of-sequence."""
    return {"bpe": bpe(tmp_path_factory.mktemp("bpe")), "pieces": pieces(tmp_path_factory.mktemp("pieces"))}


@pytest.mark.parametrize("length", [4096, 32768, pytest.param(131072, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OTHERS)
def test_a_reader_finds_everything_and_prompts_are_full(name, length, tmp_path):
    made = task(name, tmp_path)
    *rows, empty, fill = made.measure(Reader(name), length, 4, AnswerLog(None))
    scores = [row for row in rows if row.metric == "score"]
    assert {row.metric for row in rows} <= {"score", "chance", made.counts}
    assert [row.value for row in scores] == [1] * len(made.depths) and empty.value == 0
    assert [row.depth for row in scores] == list(made.depths)
    assert 0.97 <= fill.value <= 1
    assert all(len(item.prompt) + made.new_tokens(length) <= length for item in made.items(length, 2))


@pytest.mark.parametrize("kind", ["bpe", "pieces"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_tokenizer_fills_the_length(name, kind, named, tmp_path):
    made = task(name, tmp_path, named[kind])
    for item in made.items(4096, 2):
        assert 0.97 * 4096 <= len(item.prompt) + made.new_tokens(4096) <= 4096
        assert len(item.answer) <= made.new_tokens(4096)


@pytest.mark.parametrize("name", AT_DEPTHS)
def test_answers_stand_at_the_depth_that_is_asked_for(name, tmp_path):
    made = task(name, tmp_path)
    assert made.depths == (0.0, 0.25, 0.5, 0.75, 1.0)
    for item in made.items(16384, 3):
        assert item.references[0] in item.text
        assert abs(item.text.index(item.references[0]) / len(item.text) - item.depth) < 0.03
    items = made.items(16384, 4)
    scores = [made.score(item, output) for item, output in zip(items, Reader(name, 0.4).answers(items), strict=True)]
    assert scores == [float(item.depth >= 0.75) for item in items]


def test_a_single_needle_is_alone_in_prose_that_is_the_same_at_all_depths(tmp_path):
    needle = re.compile(r"The keeper of the \w+ \w+ chose the number \d+\. ?")
    found = {name: task(name, tmp_path).items(4096, 2) for name in ("needle_in_prose", "single_needle_in_prose")}
    assert {len(needle.findall(item.text)) for item in found["needle_in_prose"]} == {5}
    assert {len(needle.findall(item.text)) for item in found["single_needle_in_prose"]} == {1}
    hay = [needle.sub("", item.text).rpartition("Question:")[0].rstrip() for item in found["single_needle_in_prose"]]
    # Items come depth by depth: those of the first text are at even places.
    assert len(set(hay[::2])) == len(set(hay[1::2])) == 1 and hay[0] != hay[1]


@pytest.mark.parametrize("name", AT_DEPTHS)
def test_without_depths_tasks_that_ask_at_them_are_left_out(name):
    config = EvalConfig(depths=())
    assert TASKS[name](Materials(config, DataConfig(), tokenizers.load("bytes"), None)) is None


@pytest.mark.parametrize("name", OTHERS)
def test_a_guess_scores_chance(name, tmp_path):
    """The answers to other questions of the same kind are as good as any guess."""
    made, rng = task(name, tmp_path), random.Random(0)
    items = made.items(4096, 120 if len(made.depths) == 1 else 24)
    scores = []
    for number, item in enumerate(items):
        other = items[(number + rng.randrange(1, len(items))) % len(items)]
        # A copy of the common word alone is as much as anybody knows without reading.
        words = (
            (" ".join([max(item.references, key=item.references.count)] * item.units),)
            if name == "repeated_words"
            else other.references
        )
        scores.append(made.score(item, made.answer(item_as_sample(words))))
    low, high = interval(scores)
    chance = made.guess(items)
    assert made.guess(items) == chance
    assert low - 1e-9 <= chance <= high + 1e-9 if chance else np.mean(scores) < 0.05


def item_as_sample(references):
    from lcx.evals.text.formats import Sample

    return Sample("", "", references)


def test_groups_and_rows():
    assert {kind.counts for kind, _ in WORDS.values()} == {"", *COUNTED}
    assert set(WORDS) < set(TASKS) and {name for group in GROUPS.values() for name in group} <= set(TASKS)
    assert {group: len(names) for group, names in GROUPS.items()} == {
        "ruler": 13, "ruler2": 3, "babilong": 5, "infinitebench": 8, "graphwalks": 4, "mrcr": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "references", "output", "score"),
    [
        ("passkey", ("12345",), " 12345.", 1),
        ("passkey", ("12345",), "123456", 0),
        ("passkey", ("12345",), "", 0),
        ("infinitebench_number", ("1123445678",), "It is 1123445678", 1),
        ("infinitebench_find", ("97",), "97", 1),
        ("infinitebench_find", ("97",), "The 2nd is 97", 0),
        ("infinitebench_sum", ("1", "2", "3", "4"), "1, 2, 9, 4]", 0.5),
        ("infinitebench_sum", ("1", "2", "3", "4"), "", 0),
        ("infinitebench_code_4", ("-7",), "The result is -7.", 1),
        ("infinitebench_code_4", ("-7",), "-7 or 8", 0),
        ("infinitebench_code_4", ("-7",), "\n", 0),
        ("graphwalks_bfs_1", ("aa", "bb"), "Final Answer: [aa, cc]", 0.5),
        ("graphwalks_bfs_1", (), "Final Answer: []", 1),
        ("graphwalks_bfs_1", ("aa",), "", 0),
        ("many_shot", ("3",), "3\ntext:", 1),
        ("many_shot", ("3",), "label", 0),
        ("session_state", ("1", "2", "3", "4"), "1, 2, 3 and 4.", 1),
        ("session_state", ("1", "2", "3", "4"), "1, 2, 3", 0),
        ("latent_list", ("5", "6"), "5, 6]\nand 7", 1),
        ("latent_list", ("5", "6"), "5, 6, 7]", 0),
        ("label_counts", ("10",), "12", 0.5625),
        ("label_counts", ("10",), "many", 0),
        pytest.param("label_counts", ("10",), "7" * 400, 0, id="label_counts-400-digits"),
        pytest.param("latent_list", ("5", "6"), "5, " + "7" * 5000, 0, id="latent_list-5000-digits"),
        ("mrcr_2", ("abcdefghij", "a b c"), "abcdefghij a b c", 1),
        ("mrcr_2", ("abcdefghij", "a b c"), "a b c", 0),
        ("ruler2_mk_basic", ("1234567890",), "<think>Answer: 1</think>Answer: 1234567890", 1),
        ("ruler2_mk_basic", ("1234567890",), "Answer: 1234567890 Answer: 5", 0),
        ("induction", ("a", "b", "c", "d"), "a b x d", 0.5),
        ("repeated_words", ("a", "a", "b", "a"), "a a a a", 0.75),
        ("repeated_words", ("a", "a"), "", 0),
    ],
)
def test_scores(name, references, output, score, tmp_path):
    from lcx.evals.base import Item

    item = Item(np.zeros(1, np.int32), np.zeros(0, np.int32), references=references)
    assert task(name, tmp_path).score(item, output) == score


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("kitchen", 1),
        ("The kitchen. Not the garden.", 1),
        ("kitchen or garden", 0),
        # The question's own label does not count.
        ("before the office it was in the kitchen", 1),
        ("", 0),
        ("KITCHEN <example> garden", 1),
    ],
)
def test_babilong_takes_one_label_of_the_first_sentence(output, score, tmp_path):
    from lcx.evals.base import Item

    item = Item(
        np.zeros(1, np.int32),
        np.zeros(0, np.int32),
        text="Question: Where was the milk before the office?\nAnswer:",
        references=("kitchen",),
    )
    assert task("babilong_qa3", tmp_path).score(item, output) == score


def test_prose_of_babilong_names_nobody_and_nothing(tmp_path):
    made = task("babilong_qa1", tmp_path)
    (item,) = made.items(16384, 1)
    context = item.text.rpartition("<context>")[2].partition("</context>")[0]
    facts = [line for line in context.split(".") if any(room in line for room in ("garden", "office", "kitchen"))]
    assert all(line.split()[0] in ("John", "Mary", "Sandra", "Daniel") for line in facts)


def test_a_session_is_a_chat_where_there_is_a_template(tmp_path):
    from lcx.data.config import DataConfig
    from lcx.data.tokenizers import tokenizers
    from lcx.evals.base import Materials
    from lcx.evals.config import EvalConfig, QuestionConfig

    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>")
    config = EvalConfig(questions=QuestionConfig(1))
    data = DataConfig(chat_template=str(template))
    (item,) = TASKS["session_state"](Materials(config, data, tokenizers.load("bytes"), None)).items(2048, 1)
    assert item.text.count("<|user|>") == item.text.count("<|assistant|>") > 10
    assert item.text.endswith("<|assistant|>The values are:")


def test_matching():
    assert first_integer("a -3 4") == "-3" and first_integer("none") is None
    assert integers("no\n1, 2\n3") == [1, 2] and integers("") == []
    assert last_list("[a] and [b, c]") == {"b", "c"} and last_list("Answer: [a, b") == {"a", "b"} and last_list("[]") == set()
    assert set_f1({"a"}, {"a", "b"}) == pytest.approx(2 / 3) and set_f1(set(), {"a"}) == 0
    assert edits("kitten", "sitting") == 3 and edits("", "abc") == 3 and edits("abc", "") == 3 and edits("abc", "abc") == 0
    assert word_error_rate(["a", "b"], ["a", "c"]) == 0.5
