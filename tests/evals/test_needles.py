import re

import numpy as np
import pytest

from lcx.data.sources.sources import InMemorySource, Subset
from lcx.data.tasks.base import TaskConfig
from lcx.data.tasks.table import make_task
from lcx.data.tokenizers.tokenizers import Bytes
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Scores
from lcx.evals.results import EvalResult
from lcx.evals.statistics import wilson
from lcx.evals.tasks.needles import GeneratedNeedles, Needles

DEPTHS = (0.0, 0.5, 1.0)


def haystack() -> Subset:
    text = ("def place(x):\n    return x + 1\n" * 200).encode()
    return Subset(InMemorySource(["text"], [np.frombuffer(text, np.uint8)], [1], 256), np.arange(1))


def needles(kind: str = "multikey", seed: int = 0, of: type[Needles] = Needles) -> Needles:
    return of(make_task(kind, TaskConfig(needles=3), Bytes()), haystack(), DEPTHS, seed, (6, 2))


def recall(prompt: np.ndarray, sees: int) -> bytes:
    """What a reader that sees the last `sees` tokens of a row, its answer of five included, writes after the prompt."""
    text = bytes(prompt.astype(np.uint8))
    key = re.search(rb"\?([a-z]+)=$", text).group(1)
    found = re.search(b"#" + key + rb"=(\d+)\n", text[-sees:])
    return found.group(1) if found else b"xxxx"


class Reader:
    """A backend that reads the last `sees` tokens of the prompt."""

    def __init__(self, sees: int = 10**6) -> None:
        self.sees = sees

    def generate(self, items, new_tokens):
        assert new_tokens == 4
        return [np.frombuffer(recall(item.prompt, self.sees), np.uint8).astype(np.int32) for item in items]

    def loglikelihood(self, items):
        answers = zip(items, self.generate(items, 4), strict=True)
        return [Scores(np.zeros(4, np.float32), answer == item.answer) for item, answer in answers]


class Guesser:
    """A backend that takes digits at random."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def generate(self, items, new_tokens):
        return [self.rng.integers(48, 58, new_tokens) for _ in items]

    def loglikelihood(self, items):
        return [Scores(np.zeros(4, np.float32), self.rng.integers(48, 58, 4) == item.answer) for item in items]


def measured(backend, lengths, count=6, task=None) -> EvalResult:
    task = task or needles()
    return EvalResult(
        "test", 256, rows=tuple(row for length in lengths for row in task.measure(backend, length, count, AnswerLog(None)))
    )


def test_a_reader_that_copies_finds_everything():
    found = measured(Reader(), (128, 256, 512))
    assert found.table() == [[1, 1, 1]] * 3 and {row.n for row in found.rows} == {6}
    assert found.values("length") == [128, 256, 512] and found.effective_length() == 512
    assert {(row.low, row.high) for row in found.rows} == {wilson(6, 6)}


def test_a_guesser_finds_nothing():
    assert measured(Guesser(), (128, 256), count=50).mean() < 0.02
    assert measured(Guesser(), (128, 256), 50, needles(of=GeneratedNeedles)).mean() < 0.02


def test_a_reader_of_the_last_tokens_finds_what_stands_there():
    """Depth 0 is the far end of the context, depth 1 the near one, and length is the whole context."""
    assert measured(Reader(150), (128, 256, 512)).table() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_items_are_whole_fresh_and_end_with_their_answer():
    made = needles().items(256, 4)
    assert [(len(item.prompt), len(item.answer)) for item in made] == [(252, 4)] * 12  # the answer's last token is the 256th
    texts = [bytes(np.concatenate([item.prompt, item.answer]).astype(np.uint8)) for item in made]
    assert len(set(texts)) == 12
    again, other, longer = ([bytes(i.prompt) for i in needles(seed=s).items(256, n)] for s, n in ((0, 4), (1, 4), (0, 7)))
    prompts = [bytes(item.prompt) for item in made]
    assert again == prompts and not set(other) & set(prompts)
    assert longer[7:11] == prompts[4:8]
    for item, text in zip(made, texts, strict=True):
        key = re.search(rb"\?([a-z]+)=\d+$", text).group(1)
        assert text.index(b"#" + key + b"=") == pytest.approx(item.depth * (257 - 9 - 9), abs=1)


def test_generation_is_compared_with_the_answer_alone():
    task = needles(of=GeneratedNeedles)
    assert measured(Reader(), (256,), task=task).table() == [[1], [1], [1]]
    (item, *_), longer = task.items(256, 1), np.frombuffer(b"0", np.uint8)
    assert task.score(item, np.concatenate([item.answer, longer])) == 1
    assert task.score(item, np.concatenate([longer, item.answer])) == 0
    assert (task.count(zero_shot=False), task.count(zero_shot=True)) == (6, 2)
