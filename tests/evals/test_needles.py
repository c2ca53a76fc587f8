import re

import numpy as np
import pytest

from lcx.data.config import TaskConfig
from lcx.data.sources.sources import InMemorySource, Subset
from lcx.data.tasks import Task
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals import needles
from lcx.evals.scoring import Scores

DEPTHS = (0.0, 0.5, 1.0)


def haystack() -> Subset:
    text = ("def place(x):\n    return x + 1\n" * 200).encode()
    return Subset(InMemorySource(["text"], [np.frombuffer(text, np.uint8)], [1], 256), np.arange(1))


def items(length: int, count: int = 6, seed: int = 0, kind: str = "multikey") -> needles.Items:
    return needles.write_items(Task(kind, TaskConfig(needles=3), Bytes()), haystack(), length, DEPTHS, count, seed)


def recall(row: np.ndarray, sees: int) -> bytes:
    """What a reader that sees the last `sees` tokens answers to the question that ends the row before the answer."""
    text = bytes(row.astype(np.uint8))
    key = re.search(rb"\?([a-z]+)=$", text).group(1)
    found = re.search(b"#" + key + rb"=(\d+)\n", text[-sees:])
    return found.group(1) if found else b"xxxx"


def reader(sees: int):
    def scorer_for(length: int):
        def scorer(rows: np.ndarray, last: int) -> Scores:
            correct = np.zeros((len(rows), rows.shape[1] - 1), bool)
            for i, row in enumerate(rows):
                answer = np.frombuffer(recall(row[:-5], sees), np.uint8)
                correct[i, -5:-1] = answer == row[-5:-1]
            return Scores(np.zeros((len(rows), last), np.float32), correct[:, -last:])

        return scorer

    return scorer_for


def guesser(length: int):
    rng = np.random.default_rng(0)

    def scorer(rows: np.ndarray, last: int) -> Scores:
        guesses = rng.integers(48, 58, rows.shape)
        return Scores(np.zeros((len(rows), last), np.float32), (guesses == rows)[:, -last:])

    return scorer


def grid_of(scorer_for, lengths, count=6):
    made = {n: items(n, count) for n in lengths}
    found = {n: needles.teacher_forced(scorer_for, made[n], 1000) for n in lengths}
    return needles.grid(found, made, DEPTHS, "teacher_forced", "none", 256)


def test_a_reader_that_copies_finds_everything():
    grid = grid_of(reader(10**6), (128, 256, 512))
    assert grid.correct == ((6, 6, 6),) * 3
    assert grid.lengths == (128, 256, 512) and grid.items == 6 and grid.effective_length() == 512


def test_a_guesser_finds_nothing():
    assert grid_of(guesser, (128, 256), count=50).mean() < 0.02


def test_a_reader_of_the_last_tokens_finds_what_stands_there():
    """Depth 0 is the far end of the context, depth 1 the near one, and length is the whole context."""
    grid = grid_of(reader(150), (128, 256, 512))
    assert grid.correct == ((6, 0, 0), (6, 6, 0), (6, 6, 6))


def test_items_are_whole_fresh_and_end_with_their_answer():
    made = items(256, count=4)
    assert made.tokens.shape == (12, 257) and made.reach == 5
    assert np.array_equal(np.unique(made.answer.sum(1)), [4])
    assert made.answer[:, 252:256].all()  # the answer's last token is the 256th
    assert len({bytes(row.astype(np.uint8)) for row in made.tokens}) == 12
    assert np.array_equal(items(256, count=4).tokens, made.tokens)
    assert not np.any(np.all(items(256, count=4, seed=1).tokens == made.tokens, axis=1))
    longer = items(256, count=7)
    assert np.array_equal(longer.tokens[longer.cell == 1][:4], made.tokens[made.cell == 1])
    for row, cell in zip(made.tokens, made.cell, strict=True):
        key = re.search(rb"\?([a-z]+)=\d+\n$", bytes(row.astype(np.uint8))).group(1)
        place = bytes(row.astype(np.uint8)).index(b"#" + key + b"=")
        assert place == pytest.approx(DEPTHS[cell] * (257 - 9 - 9), abs=1)


def test_generation_is_compared_with_the_answer_alone():
    made = items(256)
    given: list[int] = []

    def copies(prompts: list[np.ndarray], new_tokens: int) -> np.ndarray:
        given.append(len(prompts))
        assert new_tokens == 4 and all(len(prompt) == 252 for prompt in prompts)
        return np.stack([np.frombuffer(recall(prompt, 10**6), np.uint8) for prompt in prompts]).astype(np.int32)

    assert needles.generated(copies, made, tokens_per_forward=1300).all()
    assert given == [5, 5, 5, 3]
    assert not needles.generated(lambda prompts, n: np.full((len(prompts), n), 48, np.int32), made, 1300).any()
