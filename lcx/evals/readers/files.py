"""Benchmarks that are read from files of the user's: which files, what a row of them asks, and how it is scored.

Prompts are worded anew. Nothing is cut: a question that is longer than the longest of `evals.lengths` is left out and counted,
where the benchmarks themselves cut the middle of its context.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from lcx.core.configs import nearest
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.files import refuse_lfs_pointer
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Backend, Item, Materials, Task, mean_score
from lcx.evals.results import Measurement
from lcx.evals.text.asking import ask
from lcx.evals.text.formats import BasePrompt, PromptFormat, Sample, choose
from lcx.evals.text.matching import cleaned


class Question(NamedTuple):
    """A question of a file: its sample, how many tokens an answer may have, and the score of a prediction.

    `plain`: asked as text to continue even of a chat model, as the benchmark does.
    """

    sample: Sample
    new_tokens: int
    score: Callable[[str], float]
    plain: bool = False


Row = Mapping[str, Any]


class Files(NamedTuple):
    """A part of a benchmark: patterns of its files, tried in turn, and what a row asks."""

    patterns: tuple[str, ...]
    question: Callable[[Row], Question]


class Benchmark(NamedTuple):
    """Its parts by name, and where the files come from."""

    parts: Mapping[str, Files]
    origin: str


@dataclasses.dataclass(frozen=True)
class FileQuestions(Task):
    """A benchmark's questions by part and by length: each counts at the shortest of `evals.lengths` that it fits into."""

    name: str
    format: PromptFormat
    plain: PromptFormat
    questions: Mapping[str, Sequence[Question]]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    notes: tuple[str, ...] = ()
    made: dict[str, list[tuple[Item, Question]]] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """The items of each part, tokenised when they are first needed."""

    @classmethod
    def row(cls, name: str, benchmark: Benchmark) -> Callable[[Materials], Self | None]:
        """A row of the table: a benchmark under a name."""

        def build(materials: Materials) -> Self | None:
            settings = materials.config.questions
            if not settings.samples:
                return None
            format = choose(settings.prompt_format, materials.tokenizer, materials.data.chat_template)
            questions = read(name, benchmark, settings.data)
            plain = BasePrompt(materials.tokenizer)
            lengths = tuple(sorted(materials.config.lengths))
            return cls(name, format, plain, questions, lengths, settings.samples, materials.config.seed)

        return build

    def count(self, zero_shot: bool) -> int:
        """`evals.questions.samples` of each part at each length."""
        return self.samples

    def measure(self, backend: Backend, length: int, count: int, log: AnswerLog) -> list[Measurement]:
        """The mean score of each part that has questions of this length, and how many are longer than the longest."""
        rows = []
        shorter = max((other for other in self.lengths if other < length), default=0)
        for part, questions in self.questions.items():
            if part not in self.made:
                self.made[part] = [(self._item(question), question) for question in questions]
            sized = self.made[part]
            sizes = [len(item.prompt) + question.new_tokens for item, question in sized]
            fitting = [pair for pair, size in zip(sized, sizes, strict=True) if shorter < size <= length]
            too_long = sum(size > self.lengths[-1] for size in sizes)
            if length == self.lengths[-1] and too_long:
                many = f"{too_long} of {len(questions)} questions of {part}"
                warn(f"{self.name}: {many} are longer than {length:,} tokens, and left out")
                rows.append(Measurement(f"{self.name}_{part}", "left_out", length, too_long / len(questions), len(questions)))
            if not fitting:
                continue
            rng = random.Random(f"{self.seed} {self.name} {part} {length}")
            chosen = rng.sample(fitting, min(count, len(fitting)))
            items, scores, empty = self._scores(backend, log, part, length, chosen)
            task, n = f"{self.name}_{part}", len(scores)
            rows.append(mean_score(task, "score", length, scores, items))
            rows.append(Measurement(task, "empty", length, empty / n, n))
        return rows

    def _scores(
        self, backend: Backend, log: AnswerLog, part: str, length: int, chosen: Sequence[tuple[Item, Question]]
    ) -> tuple[list[Item], list[float], int]:
        """Items, scores, and how many answers were empty; questions that allow answers of one length are asked together."""
        asked, scores, empty = [], [], 0
        for new_tokens in sorted({question.new_tokens for _, question in chosen}):
            here = [(item, question) for item, question in chosen if question.new_tokens == new_tokens]
            of = {id(item): question for item, question in here}
            items = [item for item, _ in here]
            fills = [(len(item.prompt) + new_tokens) / length for item in items]
            task = f"{self.name}_{part}"
            outputs = ask(
                backend, log, task, self.version, length, items, fills, new_tokens,
                lambda item, output, of=of: of[id(item)].score(output),
            )  # fmt: skip
            asked += items
            scores += [question.score(output) for (_, question), output in zip(here, outputs, strict=True)]
            empty += sum(not cleaned(output) for output in outputs)
        return asked, scores, empty

    def _item(self, question: Question) -> Item:
        format, sample = self.plain if question.plain else self.format, question.sample
        text = format.text(sample)
        tokens = format.encode(text)
        return Item(tokens, tokens[:0], None, text, sample.references, (*sample.turns, sample.prompt), sample.prefix)


def read(name: str, benchmark: Benchmark, folder: str | None) -> dict[str, list[Question]]:
    """The questions of every part whose files are there; raises `UserError` if none are, or a row has another layout."""
    wanted = ", ".join(files.patterns[0] for files in benchmark.parts.values())
    where = f"it looks for {wanted}; they come from {benchmark.origin}"
    if folder is None:
        raise UserError(f"{name} reads files; name their folder with --data or evals.questions.data: {where}")
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"evals.questions.data={folder!r} is not a directory; {where}")
    found = {}
    for part, files in benchmark.parts.items():
        paths = next((matches for pattern in files.patterns if (matches := sorted(root.glob(pattern)))), [])
        questions = [_question(files, row, place) for path in paths for place, row in records(path)]
        if questions:
            found[part] = questions
    if not found:
        raise UserError(f"evals.questions.data={folder!r} has no file of {name}; {where}")
    return found


def _question(files: Files, row: Row, place: str) -> Question:
    try:
        return files.question(row)
    except KeyError as error:
        raise UserError(f"{place} has no {error.args[0]!r}{nearest(str(error.args[0]), row)}") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{place} is laid out differently ({type(error).__name__}: {error}); give the benchmark's own file"
        ) from error


def records(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON Lines, JSON or Parquet file, each with its place; raises `UserError` for what is no such file."""
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        else:
            rows = json.loads(path.read_text("utf-8"))
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; install the extra: pip install -e '.[hf]'") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} does not hold a list of rows; give the benchmark's own file")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row
