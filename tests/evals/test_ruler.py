"""RULER's thirteen tasks: what stands in their prompts, how full they are, and what readers of all or part of them score."""

import collections
import re

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.tokenizers import tokenizers
from lcx.evals.answers import AnswerLog
from lcx.evals.text import noise, words
from lcx.evals.text.matching import any_contained, cleaned, share_contained
from lcx.evals.text.prose import split
from tests.evals.text_cases import NEEDLES, RULER, Reader, bpe, hotpot, pieces, task

SINGLE = tuple(name for name in NEEDLES if "multivalue" not in name and "multiquery" not in name)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Tokenizers by name: bytes, a byte-level BPE, and SentencePiece with begin-of-sequence."""
    return {"bytes": "bytes", "bpe": bpe(tmp_path_factory.mktemp("bpe")), "pieces": pieces(tmp_path_factory.mktemp("pieces"))}


def test_thirteen_tasks():
    assert len(RULER) == 13 and len(NEEDLES) == 8


@pytest.mark.parametrize("length", [4096, 32768, 131072, pytest.param(1 << 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RULER)
def test_a_reader_finds_everything_and_prompts_are_full(name, length, tmp_path):
    made = task(name, tmp_path)
    score, empty, fill = made.measure(Reader(name), length, 4, AnswerLog(None))
    assert (score.value, score.n, score.high) == (1, 4, 1) and empty.value == 0
    assert 0.97 <= fill.value <= 1
    assert all(len(item.prompt) + made.new_tokens(length) <= length for item in made.items(length, 4))


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "pieces"])
@pytest.mark.parametrize("name", RULER)
def test_every_tokenizer_fills_the_length(name, kind, length, named, tmp_path):
    made = task(name, tmp_path, named[kind])
    tokenizer = tokenizers.load(named[kind])
    for item in made.items(length, 3):
        assert 0.97 * length <= len(item.prompt) + made.new_tokens(length) <= length
        assert len(item.answer) < made.new_tokens(length)
        assert (item.prompt[0] == tokenizer.bos_id) == tokenizer.begins_with_bos
        assert tokenizer.decode(item.prompt).strip() == item.text.strip()


@pytest.mark.parametrize("name", RULER)
def test_answers_occur_where_they_should_and_nowhere_else(name, tmp_path):
    for item in task(name, tmp_path).items(8192, 5):
        text, references = item.text.lower(), [reference.lower() for reference in item.references]
        assert len(set(references)) == len(references)
        for reference in references:
            assert not any(reference in other for other in references if other != reference)
            if "qa" not in name:
                assert len(re.findall(rf"(?<![\w-]){reference}(?![\w-])", text)) == text.count(reference) > 0
        if "niah" in name:
            assert all(text.count(reference) == 1 for reference in references)


@pytest.mark.parametrize("name", SINGLE)
def test_a_reader_of_the_last_quarter_scores_what_the_depths_predict(name, tmp_path):
    made = task(name, tmp_path)
    items = made.items(16384, 60)
    scores = [made.score(item, output) for item, output in zip(items, Reader(name, 0.25).answers(items), strict=True)]
    unclear = [0.72 < item.depth < 0.78 for item in items]
    assert all(score == (item.depth > 0.75) for score, item, near in zip(scores, items, unclear, strict=True) if not near)
    assert 0.05 < np.mean(scores) < 0.5 and sum(unclear) < 12


@pytest.mark.parametrize("name", RULER)
def test_a_guess_scores_chance(name, tmp_path):
    made = task(name, tmp_path)
    items = made.items(4096, 8)
    others = made.items(4352, 8)
    guesses = [", ".join(other.references) for other in others]
    if "qa" in name:
        guesses = ["nobody"] * 8
    assert np.mean([made.score(item, guess) for item, guess in zip(items, guesses, strict=True)]) <= made.chance + 0.15


@pytest.mark.parametrize("name", ["ruler_niah_single_2", "ruler_niah_multikey_1"])
def test_a_needle_stands_within_one_sentence_of_its_depth(name, tmp_path):
    for item in task(name, tmp_path).items(8192, 10):
        sentences = split(item.text.split("\n", 1)[1].rpartition("\nWhat ")[0])
        (place,) = [i for i, sentence in enumerate(sentences) if item.references[0] in sentence]
        others = [i for i, sentence in enumerate(sentences[:place]) if sentence.startswith("One of the special magic ")]
        needles = sum(sentence.startswith("One of the special magic ") for sentence in sentences)
        assert abs(place - len(others) - item.depth * (len(sentences) - needles)) <= 1


def test_samples_do_not_depend_on_how_many_there_are_and_differ(tmp_path):
    for name in RULER:
        made = task(name, tmp_path)
        few, many = made.items(4096, 2), made.items(4096, 4)
        assert [x.text for x in few] == [x.text for x in many[:2]] and len({x.text for x in many}) == 4
        assert all(many[0].text != item.text for item in task(name, tmp_path).items(4099, 1))


@pytest.mark.parametrize(
    ("name", "needles", "asked", "value"),
    [
        ("single_1", 1, 1, r"\d{7}"),
        ("single_2", 1, 1, r"\d{7}"),
        ("single_3", 1, 1, r"[\da-f-]{36}"),
        ("multikey_1", 4, 1, r"\d{7}"),
        ("multivalue", 4, 4, r"\d{7}"),
        ("multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_of_each_kind(name, needles, asked, value, tmp_path):
    made = task(f"ruler_niah_{name}", tmp_path)
    assert made.answer_tokens == 128
    for item in made.items(4096, 3):
        found = re.findall(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.", item.text)
        assert len(found) == needles and len(item.references) == asked
        assert len({key for _, key, _ in found}) == (1 if name == "multivalue" else needles)
        assert all(re.fullmatch(value, number) for _, _, number in found)
        assert set(item.references) <= {number for _, _, number in found}
        one = len(item.references) == 1
        assert item.text.endswith(" is" if one else " are")
        assert item.text.startswith("A special magic " if one else "Some special magic ")
    if name == "multiquery":
        assert re.search(r"for [\w-]+, [\w-]+, [\w-]+, and [\w-]+ that the text above mentions are$", item.text)


@pytest.mark.parametrize(("name", "key"), [("multikey_2", r"[a-z]+-[a-z]+"), ("multikey_3", r"[\da-f-]{36}")])
def test_a_haystack_of_needles(name, key, tmp_path):
    (item,) = task(f"ruler_niah_{name}", tmp_path).items(4096, 1)
    lines = item.text.split("\n")[1:-1]
    assert len(lines) > 20 and all(re.fullmatch(rf"One of the special magic \w+ for {key} is: [\da-f-]+\.", line) for line in lines)
    assert len({line.split(" is: ")[1] for line in lines}) == len({line.split(" is: ")[0] for line in lines}) == len(lines)


def test_variable_tracking(tmp_path):
    made = task("ruler_vt", tmp_path)
    assert made.answer_tokens == 30
    for item in made.items(8192, 4):
        example, asked = item.text.split("\n\nFollow the chain")
        solved = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", example)
        chain = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", asked)
        assert [len(name) for name, _ in solved] == [3] * 5 and solved[0][1] != chain[0][1]
        assert example.endswith("they are: " + " ".join(name for name, _ in solved)) and "VAR" not in dict(solved)
        assert [len(name) for name, _ in chain] == [5] * 5 and 10000 <= int(chain[0][1]) <= 99998
        assert [right for _, right in chain[1:]] == [name for name, _ in chain[:-1]]
        assert item.references == tuple(name for name, _ in chain)
        assert item.text.endswith(f"5 variables are assigned the value {chain[0][1]}, they are:")


@pytest.mark.parametrize(("length", "often", "seldom", "words_", "few"), [(4096, 6, 1, 10, 3), (16384, 30, 3, 30, 10)])
def test_common_words(length, often, seldom, words_, few, tmp_path):
    made = task("ruler_cwe", tmp_path)
    assert made.answer_tokens == 120
    for item in made.items(length, 3):
        example, asked = item.text.split("\nBelow is a numbered list")
        for text, high, low in ((example, few, 3 if often == 30 else 1), (asked, often, seldom)):
            listed = text.split("occur most often.\n")[1].split("\nQuestion:")[0]
            numbers, entries = zip(*re.findall(r"(\d+)\. ([a-z]+)", listed), strict=True)
            counts = collections.Counter(entries)
            assert [int(x) for x in numbers] == list(range(1, len(numbers) + 1))
            assert sorted(counts.values())[-10:] == [high] * 10 and set(counts.values()) == {high, low}
        assert {word for word, count in counts.items() if count == often} == set(item.references)
        assert len(re.findall(r"\d+\. [a-z]+", example.rpartition("are:")[2])) == 10
        assert len(counts) >= words_


def test_long_lists_go_on_with_compound_words():
    import random

    drawn = words.unique_words(random.Random(0), 12_000)
    assert len(set(drawn)) == 12_000 and all(word.isalpha() and word.islower() for word in drawn)


def test_frequent_words(tmp_path):
    made = task("ruler_fwe", tmp_path)
    assert made.answer_tokens == 50
    (item,) = made.items(65536, 1)
    coded = item.text.split("give no explanation.\n")[1].split("\nQuestion:")[0].split()
    counts = collections.Counter(coded).most_common(5)
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == list(item.references)
    shares = [count / (counts[0][1] / 0.6079) for _, count in counts]
    np.testing.assert_allclose(shares, [0.608, 0.152, 0.0675, 0.0380, 0.0243], rtol=0.02)
    assert all(len(word) == 6 for word in set(coded) - {"..."})
    # floor((L - 50) / 50) words, of which the rarest occur less than once.
    assert len(set(coded)) <= (65536 - 50) // 50


@pytest.mark.parametrize(("name", "gold"), [("ruler_qa_1", 1), ("ruler_qa_2", 1)])
def test_documents(name, gold, tmp_path):
    made = task(name, tmp_path)
    assert made.answer_tokens == 32
    items = made.items(8192, 12)
    places = []
    for item in items:
        documents = re.split(r"Document \d+:\n", item.text.split("These are the given documents.\n\n")[1])[1:]
        holding = [i for i, text in enumerate(documents) if item.references[0] in text]
        assert holding and item.text.count("Answer the question from the given documents.") == 2
        assert item.text.endswith(" Answer:")
        places.append(holding[0] / len(documents))
    assert len({item.text[-120:] for item in items}) > 6
    assert len({round(place, 1) for place in places}) > 4


def test_faithful_quirks(named, tmp_path):
    for name, unit in (("single_1", 25), ("multikey_2", 25)):
        made = task(f"ruler_niah_{name}", tmp_path, faithful=True)
        for item in made.items(16384, 3):
            assert (len(item.text.split("\n")) - 3) % unit == 0
    made = task("ruler_qa_1", tmp_path, faithful=True)
    first, second, _ = made.items(8192, 3)
    assert "town 0-0?" in first.text[-60:] and "town 0-1?" in second.text[-60:]
    where = {re.search(r"Document (\d+):\n[^\n]*" + item.references[0], item.text)[1] for item in (first, second)}
    assert len(where) == 1
    made = task("ruler_niah_single_2", tmp_path, named["pieces"], faithful=True)
    (item,) = made.items(8192, 1)
    assert made.counted(len(item.prompt)) == len(item.prompt) - 1 and made.new_tokens(8192) == 128
    starts = {item.text.split("\n")[1][:20] for item in made.items(8192, 3)}
    assert len(starts) <= 2


def test_faithful_prompts_never_exceed_the_length(tmp_path):
    for name in RULER:
        made = task(name, tmp_path, faithful=True)
        fills = [(made.counted(len(item.prompt)) + made.new_tokens(32768)) / 32768 for item in made.items(32768, 2)]
        assert min(fills) > 0.8 and max(fills) <= 1


@pytest.mark.parametrize(
    ("prediction", "references", "all_of", "any_of"),
    [
        ("The numbers are 123 and 456.", ("123", "456"), 1, 1),
        ("Only 123", ("123", "456"), 0.5, 1),
        ("", ("123",), 0, 0),
        ("PARIS\x00", ("Paris",), 1, 1),
        ("12 3", ("123",), 0, 0),
        ("the the", ("The", "a"), 0.5, 1),
    ],
)
def test_scoring(prediction, references, all_of, any_of):
    assert share_contained(cleaned(prediction), references) == all_of
    assert any_contained(cleaned(prediction), references) == any_of


@pytest.mark.parametrize(
    ("raw", "clean"),
    [(" a\tb ", "a\nb"), ("\x1fa\x00", "a"), ("a\r\nb", "a\n\nb"), ("", ""), (" \n\t", ""), ("é\x7f", "é\x7f")],
)
def test_post_processing(raw, clean):
    assert cleaned(raw) == clean


def test_chat_form(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>")
    from lcx.data.config import DataConfig
    from lcx.evals.base import Materials
    from lcx.evals.config import EvalConfig, QuestionConfig
    from lcx.evals.tasks.table import TASKS

    config = EvalConfig(questions=QuestionConfig(2))
    made = TASKS["ruler_niah_single_1"](Materials(config, DataConfig(chat_template=str(template)), tokenizers.load("bytes"), None))
    for item in made.items(2048, 2):
        assert item.text.startswith("<|user|>A special magic")
        assert re.search(r"that the text above mentions\?<\|end\|><\|assistant\|>The special magic .* is$", item.text)
        assert 0.97 * 2048 <= len(item.prompt) + 128 <= 2048
    with pytest.raises(UserError, match="has no chat template"):
        task("ruler_vt", tmp_path, prompt_format="chat")


def test_answers_are_kept_one_by_one(tmp_path):
    made, name = task("ruler_niah_single_1", tmp_path), "ruler_niah_single_1"
    path = tmp_path / "answers.jsonl"

    class Killed(Reader):
        def complete(self, items, new_tokens):
            for answers in super().complete(items, new_tokens):
                if self.asked > 6:
                    raise KeyboardInterrupt
                yield answers

    first = Killed(name)
    with pytest.raises(KeyboardInterrupt):
        made.measure(first, 4096, 10, AnswerLog(path))
    assert len(path.read_text().splitlines()) == 6
    # The seventh answer was being written.
    path.write_text(path.read_text() + '{"key": "cut')
    second = Reader(name)
    rows = made.measure(second, 4096, 10, AnswerLog(path))
    assert first.asked == 9 and second.asked == 4 and rows == made.measure(Reader(name), 4096, 10, AnswerLog(None))
    third = Reader(name)
    assert made.measure(third, 4096, 10, AnswerLog(path)) == rows and third.asked == 0
    path.write_text("[]\n" + path.read_text())
    with pytest.raises(UserError, match="is damaged"):
        AnswerLog(path)


@pytest.mark.parametrize(
    ("name", "settings", "length", "message"),
    [
        ("ruler_vt", {}, 512, r"evals.lengths has 512, but ruler_vt takes at least 1,\d+ tokens with this tokenizer"),
        ("ruler_niah_single_2", {"prose": ("nowhere/*.txt",)}, 4096, r"evals.questions.prose='nowhere/\*.txt' matches no file"),
    ],
)
def test_what_cannot_be_asked(name, settings, length, message, tmp_path):
    with pytest.raises(UserError, match=message):
        task(name, tmp_path, **settings).items(length, 1)
    with pytest.raises(UserError, match=message):
        task(name, tmp_path, **settings).check(length)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist or is not a file; give SQuAD"),
        ("{}", "laid out neither like SQuAD nor like HotpotQA"),
        ('{"data": []}', "has no question with an answer"),
        ("[1]", "laid out neither"),
        ("{", "laid out neither"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_wrong_question_files(content, message, tmp_path):
    from lcx.evals.tasks.ruler_qa import read

    path = tmp_path / "wrong.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(str(path), "evals.questions.qa_1")


def test_hotpot_keeps_the_supporting_documents(tmp_path):
    from lcx.evals.tasks.ruler_qa import read

    reading = read(hotpot(tmp_path / "h.json"), "evals.questions.qa_2")
    question = reading.questions[3]
    assert reading.documents[question.gold[0]].startswith("Hill 3\nHill 3 is green.") and len(question.similar) == 9


def test_the_own_prose_of_the_user(tmp_path):
    (tmp_path / "a.txt").write_text("It was cold.  The wind blew.\nNobody came? " * 5)
    (item,) = task("ruler_niah_single_2", tmp_path, prose=(str(tmp_path / "*.txt"),)).items(4096, 1)
    assert "It was cold. The wind blew. Nobody came?" in item.text


def test_noise():
    assert noise.lines(7) == [noise.TEXT, "The grass is green. The sky is blue."] and noise.count(2) == 10
