"""Benchmarks that are read from files of the user's: which files, what a row of them asks, and how it is scored.

Prompts are worded anew. Nothing is cut: a question that is longer than the longest of `evals.lengths` is left out and counted,
where the benchmarks themselves cut the middle of its context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from lcx.core.configs import nearest
from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.core.files import refuse_lfs_pointer
from lcx.evals.answers import AnswerLog
from lcx.evals.base import Backend, Item, Materials, Task, mean_score, warn_left_out
from lcx.evals.results import Measurement
from lcx.evals.text.asking import ask
from lcx.evals.text.formats import BasePrompt, PromptFormat, Sample, choose
from lcx.evals.text.matching import cleaned
from lcx.evals.text.questions import TextQuestions, answer_room


class Question(NamedTuple):
    """A question of a file: its sample, how many tokens an answer may have, and the score of a prediction.

    `plain`: asked as text to continue even of a chat model, as the benchmark does. `answer`: a right one in full; a tokenizer that
    needs more tokens for it is given more.
    """

    sample: Sample
    new_tokens: int
    score: Callable[[str], float]
    plain: bool = False
    answer: str | None = None


Row = Mapping[str, Any]
Placed = tuple[str, Row]
"""A row, and where it stands: the file and the row's number, as errors name them."""


class Files(NamedTuple):
    """A part of a benchmark: patterns of its files, tried in turn, and what a row asks.

    `arrange` splits, joins or drops the rows of a file first. `examples` are patterns of files whose rows every row is given as
    `row["examples"]`. Of a file of more than `most` rows, so many are drawn. `needs` is a library of the extra `suites`. `overall`
    makes further metrics, by name, of the references and scores of all questions of a length.
    """

    patterns: tuple[str, ...]
    question: Callable[[Row], Question]
    arrange: Callable[[Iterable[Placed]], Iterable[Placed]] | None = None
    examples: tuple[str, ...] = ()
    most: int | None = None
    needs: str | None = None
    overall: Callable[[Sequence[Sequence[str]], Sequence[float]], Mapping[str, float]] | None = None


class Fitted(NamedTuple):
    """A part of a benchmark whose prompts are composed of files and fitted to every length.

    `build` makes its questions under a name, of the files in a folder; None if they are not there.
    """

    patterns: tuple[str, ...]
    build: Callable[[str, Materials, PromptFormat, pathlib.Path], TextQuestions | None]


class Benchmark(NamedTuple):
    """Its parts by name, and where the files come from."""

    parts: Mapping[str, Files | Fitted]
    origin: str


@dataclasses.dataclass(frozen=True)
class FileQuestions(Task):
    """A benchmark's questions by part and by length: each counts at the shortest of `evals.lengths` that it fits into.

    Parts that are `fitted` have questions of every length that is long enough.
    """

    name: str
    format: PromptFormat
    plain: PromptFormat
    parts: Mapping[str, Files | Fitted]
    questions: Mapping[str, Sequence[Question]]
    fitted: Sequence[TextQuestions]
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
            questions, found = read(name, benchmark, materials.given("data"), materials, format)
            fitted = [task for task in found if task.depths]
            if not questions and not fitted:
                return None
            plain = BasePrompt(materials.tokenizer)
            lengths = tuple(sorted(materials.config.lengths))
            seed = materials.config.seed
            return cls(name, format, plain, benchmark.parts, questions, fitted, lengths, settings.samples, seed)

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
                self.made[part] = [self._tokenised(question) for question in questions]
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
            files = self.parts[part]
            if isinstance(files, Files) and files.overall is not None:
                found = files.overall([item.references for item in items], scores)
                rows += [Measurement(task, metric, length, value, n) for metric, value in found.items()]
            rows.append(Measurement(task, "empty", length, empty / n, n))
        for task in self.fitted:
            try:
                task.check(length)
            except UserError:
                warn_left_out([task.name], [length])
                continue
            rows += task.measure(backend, length, count, log)
        return rows

    def _scores(
        self, backend: Backend, log: AnswerLog, part: str, length: int, chosen: Sequence[tuple[Item, Question]]
    ) -> tuple[list[Item], list[float], int]:
        """Items, scores, and how many answers were empty; questions that allow answers of one length are asked together."""
        asked: list[Item] = []
        scores: list[float] = []
        empty = 0
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

    def _tokenised(self, question: Question) -> tuple[Item, Question]:
        """The item of a question, and the question with the room that the tokenizer needs for its answer."""
        format, sample = self.plain if question.plain else self.format, question.sample
        if question.answer is not None:
            question = question._replace(new_tokens=answer_room(format.tokenizer, question.answer, question.new_tokens))
        text = format.text(sample)
        tokens = format.encode(text)
        return Item(tokens, tokens[:0], None, text, sample.references, (*sample.turns, sample.prompt), sample.prefix), question


def read(
    name: str, benchmark: Benchmark, folder: str | None, materials: Materials, format: PromptFormat
) -> tuple[dict[str, list[Question]], list[TextQuestions]]:
    """The questions of every part whose files are there, and the parts that are fitted to lengths.

    Raises `UserError` if there are none, a row has another layout, or a part needs a library that is not installed.
    """
    wanted = ", ".join(part.patterns[0] for part in benchmark.parts.values())
    where = f"it looks for {wanted}; they come from {benchmark.origin}"
    if folder is None:
        raise UserError(f"{name} reads files; name their folder with evals.questions.data: {where}")
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"evals.questions.data={folder!r} is not a directory; {where}")
    found: dict[str, list[Question]] = {}
    fitted: list[TextQuestions] = []
    for key, part in benchmark.parts.items():
        if isinstance(part, Fitted):
            task = part.build(f"{name}_{key}", materials, format, root)
            fitted += [task] if task is not None else []
        elif questions := list(_questions(f"{name}_{key}", part, root)):
            found[key] = questions
    if not found and not fitted:
        raise UserError(f"evals.questions.data={folder!r} has no file of {name}; {where}")
    return found, fitted


def matching(root: pathlib.Path, patterns: Iterable[str]) -> list[pathlib.Path]:
    """The files of the first pattern that has any, in order."""
    return next((paths for pattern in patterns if (paths := sorted(root.glob(pattern)))), [])


def _questions(task: str, files: Files, root: pathlib.Path) -> Iterator[Question]:
    paths = matching(root, files.patterns)
    if paths and files.needs:
        library(files.needs, task, "suites")
    examples = [row for path in matching(root, files.examples) for _, row in records(path)] if paths else []
    if paths and files.examples and not examples:
        warn(f"{task} has no solved examples in its prompts: {files.examples[0]} is not in {root}")
    for path in paths:
        placed = records(path, files.most)
        for place, row in files.arrange(placed) if files.arrange else placed:
            given = {**row, "examples": examples} if files.examples else row
            with laid_out(place, given):
                question = files.question(given)
            yield question


@contextlib.contextmanager
def laid_out(place: str, row: Row) -> Iterator[None]:
    """Turns what goes wrong with a row of another layout into a `UserError` that names its place."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{place} has no {error.args[0]!r}{nearest(str(error.args[0]), row)}") from error
    except (TypeError, ValueError, IndexError, AttributeError, SyntaxError) as error:
        raise UserError(
            f"{place} is laid out differently ({type(error).__name__}: {error}); give the benchmark's own file"
        ) from error


def records(path: pathlib.Path, most: int | None = None) -> Iterator[Placed]:
    """The rows of a JSON Lines, JSON or Parquet file, each with its place; of more than `most`, so many that are drawn by its name.

    Raises `UserError` for what is no such file.
    """
    refuse_lfs_pointer(path)
    try:
        rows = _parquet(path, most) if path.suffix == ".parquet" else _json(path, most)
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; install the extra: pip install -e '.[hf]'") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
    if not all(isinstance(row, dict) for _, row in rows):
        raise UserError(f"{path} does not hold a list of rows; give the benchmark's own file")
    for number, row in rows:
        yield f"{path}, row {number + 1}", row


def _json(path: pathlib.Path, most: int | None) -> list[tuple[int, Any]]:
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        # Not `splitlines`, which breaks a line at more characters than JSON Lines does.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = []
        for number in _drawn(len(lines), most, path):
            try:
                # Not strict: files of benchmarks have bare tabs in their texts.
                rows.append((number, json.loads(lines[number], strict=False)))
            except ValueError as error:
                # What ends in the middle was not fetched in full; what is broken before its end came so.
                if number == len(lines) - 1:
                    raise
                warn(f"{path}, row {number + 1} is not JSON ({error}), and left out")
        return rows
    rows = json.loads(text, strict=False)
    if not isinstance(rows, list):
        raise UserError(f"{path} does not hold a list of rows; give the benchmark's own file")
    return [(number, rows[number]) for number in _drawn(len(rows), most, path)]


def _parquet(path: pathlib.Path, most: int | None) -> list[tuple[int, Any]]:
    """A group of rows at a time: a file may be larger than memory."""
    import pyarrow.parquet

    file, first = pyarrow.parquet.ParquetFile(path), 0
    wanted, rows = _drawn(file.metadata.num_rows, most, path), []
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        here = [number for number in wanted if first <= number < first + size]
        if here:
            table = file.read_row_group(group).take([number - first for number in here])
            rows += zip(here, table.to_pylist(), strict=True)
        first += size
    return rows


def _drawn(count: int, most: int | None, path: pathlib.Path) -> Sequence[int]:
    if most is None or count <= most:
        return range(count)
    return sorted(random.Random(path.name).sample(range(count), most))
