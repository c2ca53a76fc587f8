"""Cloze questions: gaps by hand, and rows whose answers stand once, far back, in the text of the row itself."""

import pydoc_data.topics
import random
import re

import numpy as np
import pytest

from lcx.core.errors import UserError
from lcx.data.config import DataConfig, PartConfig, SourceConfig
from lcx.data.loader import Loader
from lcx.data.synthetic import gaps
from lcx.data.synthetic.questions import BLANK, QuestionsConfig, QuestionTask
from lcx.data.tokenizers.tokenizers import Bytes

PROSE = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
ASKED = "|".join(re.escape(one) for one in ("fill the blank: ", "restore them: ", "Complete it: "))


TEXT = "red ant and blue bee then red ant met cold owl near blue bee so red ant ran by blue bee"


def find(text, words=1, room=20, most=6, before=None, seed=0):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    space = np.zeros(256, bool)
    space[[10, 32]] = True
    before = len(text) if before is None else before
    found = gaps.find(random.Random(seed), tokens, space, space, Bytes().decode, words=words, room=room, most=most, before=before)
    return found and tuple(Bytes().decode(part) for part in found)


def answers(text, **options):
    return {found and found[1] for found in (find(text, seed=seed, **options) for seed in range(80))}


def test_a_gap_is_a_word_that_occurs_once():
    # `so` and `by` are short, `and` and `then` stand between words that occur several times, as do all others.
    assert answers(TEXT) == {" met", " cold", " owl", " near", " ran"}
    assert answers(TEXT, before=TEXT.index(" cold")) == {" met"}
    assert answers(TEXT, before=8) == {None}
    assert answers("the fox saw the fox saw the fox saw the fox") == {None}
    for seed in range(20):
        left, answer, right = find(TEXT, seed=seed)
        assert left + answer + right in TEXT and len(left + answer + right) == 20


def test_a_gap_of_two_words_holds_one_that_occurs_once():
    found = answers(TEXT, words=2, most=10, room=24)
    assert {" ant met", " met cold", " cold owl", " owl near", " near blue", " bee then", " then red"} <= found
    assert not {" red ant", " blue bee"} & found


def test_what_is_meant_is_clear_from_one_side():
    # 123 and 456 stand between the same words, as far as a short passage shows; a longer one reaches what differs.
    text = "aa so it is no 123 and so it is no 456 and so it is bb"
    assert answers(text, room=14, most=4) == {None}
    assert answers(text, room=40, most=4) == {" 123", " 456"}


def test_a_part_of_a_longer_word_does_not_count_and_a_gap_ends_with_its_line():
    assert " cat" not in answers("one cat sat with some catnip on two mats for ten days in all", room=14)
    assert answers("nothing\n   here\n  but\nlines\n and\n one more\n today", room=12, most=8) <= {" more", None}


def rows_of(length, count=16, **config):
    tokenizer = Bytes()
    task = QuestionTask(QuestionsConfig(skills=("cloze",), **config), tokenizer)

    class Stream:
        tokens = tokenizer.encode(PROSE)
        num_tokens = len(tokens)

        def windows(self, starts, length):
            return np.stack([self.tokens[start : start + length] for start in starts])

    task.check(length, Stream())
    return task.rows(np.random.default_rng(1).random((count, 2)), length, Stream())


@pytest.mark.parametrize(("questions", "distance", "words"), [(3, 0.25, 2), (5, 0.5, 1), (2, 0.0, 3)])
def test_answers_stand_once_in_the_row_and_far_from_the_questions(questions, distance, words):
    length, depths = 6000, []
    rows = rows_of(length, questions=questions, gap_distance=distance, gap_words=words, answer_weight=5.0)
    for tokens, weights, answers in zip(*rows[:3], strict=True):
        text = Bytes().decode(tokens)
        assert len(tokens) == length + 1
        context, *asked = re.split(r"\nQuestion: ", text)
        assert len(asked) == questions
        for one in asked:
            question, answer = one.rstrip("\n").split("\nAnswer:")
            left, right = re.split(ASKED, question)[1].split(BLANK)
            # A passage of bytes may begin within a character.
            left, right = left.lstrip("\ufffd"), right.rstrip("\ufffd")
            assert context.count(left + answer + right) == 1 and context.count(answer.strip()) == 1
            place = len(context[: context.index(left + answer + right)].encode()) + len((left + answer).encode())
            size = len(context.encode())
            assert size - place >= distance * length - 1
            assert max(map(context.count, (left, right))) >= 1 and min(map(context.count, (left, right))) == 1
            depths.append(place / size)
        assert Bytes().decode(tokens[answers]) == "".join(f"{one.split(chr(10) + 'Answer:')[1].rstrip(chr(10))}\n" for one in asked)
        assert np.all(weights[answers] == 5.0) and set(np.unique(weights[~answers]).tolist()) == {0.0, 1.0}
    assert max(depths) <= 1 - distance + 0.1 and min(depths) < 0.2


def test_a_mixture_takes_the_skill(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE)
    part = PartConfig(
        kind="questions", source=SourceConfig("text", f"{tmp_path}/a.txt"), questions=QuestionsConfig(skills=("cloze",))
    )
    loader = Loader(DataConfig(parts={"cloze": part}, heldout_fraction=0.0), 2048, 2, seed=0)
    batch = loader.batch(0)
    assert all(BLANK in Bytes().decode(row) for row in batch.tokens) and set(np.unique(batch.loss_weights)) == {0.0, 1.0, 6.0}
    again = Loader(DataConfig(parts={"cloze": part}, heldout_fraction=0.0), 2048, 2, seed=0).batch(0)
    assert np.array_equal(batch.tokens, again.tokens)


def test_wrong_settings_and_rows_without_room_are_answered():
    with pytest.raises(UserError, match="questions.gap_words=0 must be above 0"):
        QuestionsConfig(gap_words=0)
    with pytest.raises(UserError, match="questions.gap_distance=1.0 must be a share of the row, from 0 to below 1"):
        QuestionsConfig(gap_distance=1.0)
    with pytest.raises(UserError, match="questions.gap_words=3 has no effect without the skill 'cloze'"):
        QuestionsConfig(skills=("copying",), gap_words=3)
    with pytest.raises(UserError, match="a row of 200 tokens is too short for a question of cloze"):
        rows_of(200)
