"""Benchmarks whose questions are composed of text and fitted to a length: one class to derive from, a few methods to write."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import inspect
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from lcx.core.errors import UserError
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Backend, Item, Materials, Task, mean_score
from lcx.evals.config import QuestionConfig
from lcx.evals.items import kept
from lcx.evals.results import Measurement
from lcx.evals.text.asking import ask
from lcx.evals.text.fit import largest
from lcx.evals.text.formats import PromptFormat, Sample, choose
from lcx.evals.text.matching import cleaned, share_contained


class Draw(NamedTuple):
    """What a sample is made with: randomness of its own, the length that it is for, its number, and the depth that is asked for."""

    rng: random.Random
    length: int
    number: int
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class TextQuestions(Task):
    """Questions composed of `units`, as many as a length holds: words, sentences, lines or documents, whatever the task says.

    A length counts every token, those of the answer included. Item i of a depth depends on the seed, the task's name and version,
    the length, the depth and i alone. With `settings.faithful`, sizes, positions and orders are drawn as RULER v1 does.
    """

    name: str
    format: PromptFormat
    settings: QuestionConfig
    seed: int
    made: dict[tuple[int, int], list[Item]] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False, kw_only=True
    )
    """The items of a length and a number, composed for the first scheme that is asked about them."""

    chance: ClassVar[float] = 0.0
    """The expected score of a guess."""
    answer_tokens: ClassVar[int]
    """How many tokens are left for the answer; a tokenizer that needs more for it is given more."""
    units_per_1024: ClassVar[int] = 16
    """A first guess of the size."""
    counts: ClassVar[str] = ""
    """What units are called where their number is what a length stands for, such as shots: the mean of a length is a row, too."""
    one_text: ClassVar[bool] = False
    """Whether the questions of a number about all depths are asked about one text: its randomness and size are then the same."""

    @abc.abstractmethod
    def compose(self, draw: Draw, units: int) -> Sample:
        """The sample of a draw, made of that many units; a pure function of both."""

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any] | None:
        """What a row of the table with these settings reads, by field; None, after a warning, if the user has named no file."""
        return {}

    @classmethod
    def row(cls, name: str, **settings: Any) -> Callable[[Materials], Self | None]:
        """A row of the table: the task under a name, with settings of its own."""

        def build(materials: Materials) -> Self | None:
            questions = materials.config.questions
            if not questions.samples or (sources := cls.sources(materials, {"name": name, **settings})) is None:
                return None
            format = choose(questions.prompt_format, materials.tokenizer, materials.data.chat_template)
            made = cls(name=name, format=format, settings=questions, seed=materials.config.seed, **settings, **sources)
            return made if made.depths else None

        return build

    @property
    def depths(self) -> Sequence[float | None]:
        """The depths that are asked for, each with as many samples; None: wherever the sample puts its answer."""
        return (None,)

    def least(self, length: int) -> int:
        """The smallest number of units."""
        return 1

    def step(self, length: int) -> int:
        """How many units `faithful` sizes are multiples of."""
        return 1

    def answer(self, sample: Sample) -> str:
        """A right answer in full, as a model would write it after the prefix."""
        return " " + ", ".join(sample.references)

    def count(self, zero_shot: bool) -> int:
        """`evals.questions.samples`, under every scheme."""
        return self.settings.samples

    def answers(self, count: int) -> int:
        """As many of each depth."""
        return count * len(self.depths)

    def new_tokens(self, length: int) -> int:
        """Tokens that are left for the answer."""
        if self.settings.faithful:
            return self.answer_tokens
        sample = self.compose(self._draw(length), self.least(length))
        return answer_room(self.format.tokenizer, self.answer(sample), self.answer_tokens)

    def items(self, length: int, count: int) -> list[Item]:
        """`count` questions of each depth that each fill the length as far as whole units allow."""
        step, least = self._steps(length)
        new_tokens, guess = self.new_tokens(length), max(1, self.units_per_1024 * length // 1024 // step)
        made = {}
        groups = [tuple(self.depths)] if self.one_text else [(depth,) for depth in self.depths]
        for depths, number in itertools.product(groups, range(count)):

            def compose(units: int, at: tuple = (number, depths)) -> tuple[int, list[tuple[Sample, str, np.ndarray]]]:
                number, depths = at
                samples = [self.compose(self._draw(length, number, depth), units * step) for depth in depths]
                texts = [self.format.text(sample) for sample in samples]
                rows = [self.format.encode(text) for text in texts]
                return self.counted(max(map(len, rows))), list(zip(samples, texts, rows, strict=True))

            found = largest(compose, length - new_tokens, least, guess)
            if found is None:
                raise _too_long(self.name, compose(least)[0] + new_tokens, length)
            guess, _, written = found
            for depth, (sample, text, tokens) in zip(depths, written, strict=True):
                right = self.format.tokenizer.encode(self.answer(sample))
                turns = (*sample.turns, sample.prompt)
                made[depth, number] = Item(
                    tokens, right, sample.depth, text, sample.references, turns, sample.prefix, guess * step
                )  # fmt: skip
        return [made[depth, number] for depth in self.depths for number in range(count)]

    def check(self, length: int) -> None:
        """Composes the smallest prompt."""
        step, least = self._steps(length)
        text = self.format.text(self.compose(self._draw(length), least * step))
        needed = self.counted(len(self.format.encode(text))) + self.new_tokens(length)
        if needed > length:
            raise _too_long(self.name, needed, length)

    def counted(self, tokens: int) -> int:
        """Tokens of a prompt that count towards the length: `faithful` leaves begin-of-sequence out."""
        return tokens - (self.settings.faithful and self.format.name == "base" and self.format.tokenizer.begins_with_bos)

    def score(self, item: Item, output: str) -> float:
        """From 0 (wrong) to 1 (right): the share of references in the output."""
        return share_contained(cleaned(output), item.references)

    def guess(self, items: Sequence[Item]) -> float:
        """The expected score of a guess at these items: `chance`, where that does not depend on them."""
        return self.chance

    def by_others(self, items: Sequence[Item], each: int = 25) -> float:
        """The mean score of answers to other questions of the same sizes at these items."""
        drawn = (
            self.compose(Draw(random.Random(f"{number} {i}"), 0, i), item.units)
            for number, item in enumerate(items[:8])
            for i in range(each)
        )
        others = [self.answer(sample) for sample in drawn]
        return sum(self.score(item, answer) for item in items for answer in others) / (len(items) * len(others))

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """The mean score of each depth with its interval; for the length the score of a guess, the mean number of units where they
        count, the share of empty answers, and how full the least full prompt is."""
        if (length, count) not in self.made:
            named = (*self._named(), length, count)
            self.made[length, count] = kept(log.items_folder, named, lambda: self.items(length, count))
        items, new_tokens = self.made[length, count], self.new_tokens(length)
        fills = [(self.counted(len(item.prompt)) + new_tokens) / length for item in items]
        outputs = ask(backend, log, self.name, self.version, length, items, fills, new_tokens, self.score)
        scores = [self.score(item, output) for item, output in zip(items, outputs, strict=True)]
        empty = sum(not cleaned(output) for output in outputs)
        rows = []
        for i, depth in enumerate(self.depths):
            here = scores[i * count : (i + 1) * count]
            rows.append(mean_score(self.name, "score", length, here, items[i * count : (i + 1) * count], depth))
        n, units = len(items), sum(item.units for item in items)
        if guess := self.guess(items):
            rows.append(Measurement(self.name, "chance", length, guess, n))
        if self.counts:
            rows.append(Measurement(self.name, self.counts, length, units / n, n))
        return [
            *rows,
            Measurement(self.name, "empty", length, empty / n, n),
            Measurement(self.name, "fill", length, min(fills), n),
        ]

    def _named(self) -> tuple[Any, ...]:
        """What items depend on but for length and number: the code of the task, its fields, and how text is written."""
        code = hashlib.sha256(inspect.getsource(inspect.getmodule(type(self))).encode()).hexdigest()
        asked = self.format.text(Sample("question", "prefix", (), turns=("one", "two")))
        own = {
            field.name: getattr(value, "digest", None) or getattr(value, "__qualname__", None) or repr(value)
            for field in dataclasses.fields(self)
            if field.init and field.name not in ("format", "settings")
            for value in [getattr(self, field.name)]
        }
        faithful = self.settings.faithful
        return (self.name, self.version, code, faithful, self.format.name, asked, self.format.tokenizer.fingerprint, own)

    def _steps(self, length: int) -> tuple[int, int]:
        """By how many units sizes differ, and the smallest size in such steps."""
        step = self.step(length) if self.settings.faithful else 1
        return step, -(-self.least(length) // step)

    def _draw(self, length: int, number: int = 0, depth: float | None = None) -> Draw:
        at = None if self.one_text else depth
        rng = random.Random(f"{self.seed} {self.name} {self.version} {length} {number} {at}")
        return Draw(rng, length, number, self.depths[0] if depth is None else depth)


def answer_room(tokenizer: Tokenizer, answer: str, least: int) -> int:
    """Tokens that are left for an answer: `least`, or half as many again as a right one takes."""
    wanted = len(tokenizer.encode(answer))
    return max(least, wanted + wanted // 2 + 8)


def _too_long(name: str, needed: int, length: int) -> UserError:
    return UserError(
        f"evals.lengths has {length:,}, but {name} takes at least {needed:,} tokens with this tokenizer; use longer ones, or leave "
        "it out of evals.tasks"
    )


def average(rows: Sequence[Measurement], task: str, members: Sequence[str]) -> list[Measurement]:
    """The plain mean of the members' scores at each length that all measured ones have, as rows of `task`; n counts the members.

    Of a single member there is none.
    """
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row.metric == "score" and row.task in members:
            scores.setdefault((row.scheme, row.length), {}).setdefault(row.task, []).append(row.value)
    most = max(map(len, scores.values()), default=0)
    made = []
    for (scheme, length), by_task in scores.items():
        if len(by_task) == most > 1:
            value = sum(sum(found) / len(found) for found in by_task.values()) / most
            made.append(Measurement(task, "average", length, value, most, scheme=scheme))
    return made
