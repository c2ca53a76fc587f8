"""The contract of a benchmark: a task makes items and scores them, a backend answers them, and what comes out is rows.

Legend: A answer tokens.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from lcx.core.configs import choice
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.data.config import DataConfig, PartConfig, SourceConfig
from lcx.data.sources.sources import Subset
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.evals.answers import AnswerLog
from lcx.evals.config import EvalConfig
from lcx.evals.results import Measurement
from lcx.evals.statistics import interval


@dataclasses.dataclass(frozen=True)
class Item:
    """One question: tokens int32 of the `prompt` (at least one) and of the right `answer`; `depth` from 0 to 1, or None.

    `text` is the prompt in words, and `references` what an answer in words is looked through for, where the task has them; `turns`
    are the messages of a user and the model by turns, the last of them the user's, and `prefix` what the answer begins with.
    `units` is how many parts a text is composed of (`lcx.evals.text.questions`).
    """

    prompt: np.ndarray
    answer: np.ndarray
    depth: float | None = None
    text: str = ""
    references: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    prefix: str = ""
    units: int = 0


class Scores(NamedTuple):
    """Per predicted token: loss in nats (float32) and whether the token is the most likely one (boolean)."""

    nll: np.ndarray
    correct: np.ndarray


class Reply(NamedTuple):
    """What a model answered in words, and how it `ended`: "stop" (the model's own end, or a stop string), "length" (the limit), or
    another reason that a server gives. Tokens of prompt and answer are None where a server does not tell."""

    text: str
    ended: str
    input_tokens: int | None = None
    output_tokens: int | None = None


def warn_left_out(tasks: Sequence[str], lengths: Iterable[int]) -> None:
    """Says that tasks are not asked at some lengths."""
    named, verb = " and ".join(f"{length:,}" for length in lengths), "is" if len(tasks) == 1 else "are"
    which = "which its shortest question does not fit into" if len(tasks) == 1 else "which their shortest questions do not fit into"
    warn(f"{', '.join(tasks)} {verb} left out at {named}, {which} with this tokenizer")


def digest(*arrays: np.ndarray) -> str:
    """Sixteen hex digits that tell token sequences from others."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(len(array).to_bytes(8, "little") + np.ascontiguousarray(array, np.int32).tobytes())
    return found.hexdigest()[:16]


def mean_score(
    task: str, metric: str, length: int, scores: Sequence[float], items: Sequence[Item], depth: float | None = None
) -> Measurement:
    """The row of some items: their mean score with its 95% interval, every score, and what the items are known by."""
    low, high = interval(scores)
    named = digest(*(tokens for item in items for tokens in (item.prompt, item.answer)))
    n, kept = len(scores), tuple(round(float(score), 6) for score in scores)
    return Measurement(task, metric, length, sum(scores) / n, n, depth, low=low, high=high, scores=kept, digest=named)


class Backend(Protocol):
    """A model under one positional scheme, for contexts up to one length."""

    def loglikelihood(self, items: Sequence[Item]) -> list[Scores]:
        """Scores `[A]` of each item's answer, every token given all right ones before it."""

    def generate(self, items: Sequence[Item], new_tokens: int) -> list[np.ndarray]:
        """`new_tokens` tokens after each item's prompt, greedily, int32."""

    def complete(self, items: Sequence[Item], new_tokens: int) -> Iterator[Mapping[int, str]]:
        """The text that follows each item's prompt, greedily: up to `new_tokens` tokens, or to where the model ends it.

        Texts come by number of the item, in any order, some at a time, as soon as they are there.
        """

    @property
    def scheme(self) -> str:
        """The scheme under which it reads positions: "none" for the checkpoint's own."""

    @property
    def fingerprint(self) -> str:
        """What tells it from every other model, and from the same one under other frequencies."""


class Evaluator(NamedTuple):
    """A model that judges texts: its backend for contexts of up to a length, its tokenizer, and its name (None: the model that is
    evaluated, under its own scheme)."""

    backend: Callable[[int], Backend]
    tokenizer: Tokenizer
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Materials:
    """What tasks are made from; `heldout` reads the documents of a source that were kept out of training.

    `evaluator` says which tokens depend on far ones (`lcx.evals.tasks.key_tokens`); None where there is no such model. `spans` are
    held-out texts that several tasks score. `read` are the settings of text and files that tasks have asked for.
    """

    config: EvalConfig
    data: DataConfig
    tokenizer: Tokenizer
    heldout: Callable[[SourceConfig], Subset]
    evaluator: Evaluator | None = None
    spans: dict[str, Any] = dataclasses.field(default_factory=dict)
    read: set[str] = dataclasses.field(default_factory=set)

    def given(self, name: str) -> Any:
        """`evals.questions.<name>`, which names text or files that a task reads."""
        self.read.add(name)
        return getattr(self.config.questions, name)

    def refuse_unread(self) -> None:
        """Raises `UserError` for text or files that no task has asked for."""
        for name in ("prose", "qa_1", "qa_2", "data"):
            value = getattr(self.config.questions, name)
            if value and name not in self.read:
                value = ", ".join(value) if name == "prose" else value
                raise UserError(
                    f"evals.questions.{name}={value} is read by none of evals.tasks ({', '.join(self.config.tasks)}); leave it out"
                )

    def part(self, name: str | None, field: str, *, is_task: bool) -> PartConfig:
        """The named part of the mixture, or the first of its kind; `field` is the setting that names it."""
        parts = self.data.parts
        if name is not None:
            part = parts[choice(f"evals.{field}", name, parts)]
            if is_task and not part.is_retrieval:
                tasks = ", ".join(key for key, value in parts.items() if value.is_retrieval)
                raise UserError(f"evals.{field}={name!r} has no retrieval task; the parts with one are: {tasks or 'none'}")
            return part
        # Task parts stand over text as well, so a mixture of tasks alone still has text to read.
        matching = [part for part in parts.values() if (part.is_retrieval if is_task else not part.is_task)]
        return (matching or list(parts.values()))[0]


class Task(abc.ABC):
    """A benchmark. Rows of different `version` must not be compared; `notes` are sentences for readers of its rows."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    same_text: ClassVar[bool] = False
    """Whether the same text is read at every length, in longer windows, and not as many rows of each length."""
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def count(self, zero_shot: bool) -> int:
        """Items a cell under the checkpoint's own scheme, or under another one; 0: not measured."""

    def check(self, length: int) -> None:  # noqa: B027
        """Raises `UserError` if no item of the task fits into a length; called for all lengths before anything is measured."""

    def answers(self, count: int) -> int | None:
        """How many answers a cell of `count` items adds to a log; None if it adds none, or if that depends on the length."""
        return None

    @abc.abstractmethod
    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """The rows of one length; answers that take long are kept in the `log`, one by one."""


class Questions(Task):
    """A benchmark of single questions, whose rows are mean scores by depth.

    `chance` is the expected score of an answer drawn at random.
    """

    chance: ClassVar[float] = 0.0
    metric: ClassVar[str] = "accuracy"

    @abc.abstractmethod
    def items(self, length: int, count: int) -> list[Item]:
        """`count` questions at each depth; item i does not depend on how many there are."""

    @abc.abstractmethod
    def score(self, item: Item, output: Any) -> float:
        """From 0 (wrong) to 1 (right)."""

    def ask(self, backend: Backend, items: Sequence[Item]) -> Sequence[Any]:
        """The outputs that `score` takes: by default greedy continuations as long as the longest answer."""
        return backend.generate(items, max(len(item.answer) for item in items))

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """The mean score at each depth."""
        scores: dict[float | None, list[float]] = {}
        asked: dict[float | None, list[Item]] = {}
        items = self.items(length, count)
        for item, output in zip(items, self.ask(backend, items), strict=True):
            scores.setdefault(item.depth, []).append(self.score(item, output))
            asked.setdefault(item.depth, []).append(item)
        return [mean_score(self.name, self.metric, length, found, asked[depth], depth) for depth, found in scores.items()]
