"""NoLiMa (Modarressi et al., 2502.05167): needles in books, of which questions ask without their words."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lcx.core.errors import UserError
from lcx.evals.base import Item, Materials
from lcx.evals.readers import scores
from lcx.evals.readers.files import Fitted, Row, laid_out, matching, records
from lcx.evals.text.formats import PromptFormat, Sample
from lcx.evals.text.questions import Draw, TextQuestions

BOOKS = ("**/rand_shuffle/*.txt", "**/rand_book_*.txt")
SETS = {"standard": "needle_set.json", "hard": "needle_set_hard.json", "direct": "needle_set_ONLYDirect.json"}
_CHARACTER = "{CHAR}"


class Needle(NamedTuple):
    """A needle, the question about it, and its answers: the name of a character that it takes, or texts of its own."""

    needle: str
    question: str
    characters: tuple[str, ...]
    answers: tuple[str, ...]


class Book:
    """A text as words, each with the space behind it, and where lines begin among them; after its end it begins again.

    Raises `UserError` for a book of less than two lines.
    """

    def __init__(self, text: str, origin: str) -> None:
        lines = [line.split() for line in text.split("\n") if line.split()]
        if len(lines) < 2:
            raise UserError(f"{origin} has fewer than two lines to put a needle between; give NoLiMa's own books")
        self.words = [word + ("\n" if i == len(line) - 1 else " ") for line in lines for i, word in enumerate(line)]
        self.starts = list(itertools.accumulate((len(line) for line in lines[:-1]), initial=0))

    def around(self, words: int, depth: float) -> tuple[str, str]:
        """Text of so many words, before and behind the first beginning of a line that has `depth` of them before it."""
        before = round(depth * words)
        turns, rest = divmod(before, len(self.words))
        at = bisect.bisect_left(self.starts, rest)
        # Past the last line, the next one is the book's first.
        start = self.starts[at] if at < len(self.starts) else len(self.words)
        middle = turns * len(self.words) + start
        endless = self.words * (1 + (middle + words) // len(self.words))
        return "".join(endless[middle - before : middle]), "".join(endless[middle : middle + words - before])


@dataclasses.dataclass(frozen=True)
class NoLiMa(TextQuestions):
    """A needle on a line of its own in a window of a book, at each of `evals.depths`. A unit is a word of the book.

    Books, needles and names are drawn for each sample. Found if the answer is in the output, capitals as they are.
    """

    needles: Sequence[Needle]
    books: Sequence[Book]
    grid: tuple[float, ...]

    answer_tokens = 32
    units_per_1024 = 128

    @property
    def depths(self) -> Sequence[float | None]:
        """Those of the evaluation."""
        return self.grid

    def compose(self, draw: Draw, units: int) -> Sample:
        """The window is the first of the book that has the beginning of a line at the depth, which the needle stands before."""
        book, drawn = draw.rng.choice(self.books), draw.rng.choice(self.needles)
        name = draw.rng.choice(drawn.characters) if drawn.characters else ""
        needle, question = (text.replace(_CHARACTER, name) for text in (drawn.needle, drawn.question))
        before, behind = book.around(units, draw.depth or 0.0)
        prompt = (
            f"Read this part of a book; a question about it follows.\n\n{before}{needle}\n{behind.rstrip()}\n\n"
            f"Question: {question}\n"
            "Answer in a few words, with what the text says or what surely follows from it, and explain nothing."
        )
        return Sample(prompt, "\nAnswer:", (name,) if name else drawn.answers, draw.depth)

    def score(self, item: Item, output: str) -> float:
        """1 if the output contains an answer, capitals as they are."""
        return scores.named(output, item.references)


def needles(row: Row) -> Iterator[Needle]:
    """All needles of a row: each of its `questions` with the `input_args` of each of its `tests` in place of {1}, {2}, ..."""
    for question, test in itertools.product(row["questions"].values(), row["tests"].values()):
        needle, asked = row["needle"], question
        for number, argument in enumerate(test["input_args"], 1):
            needle, asked = (text.replace(f"{{{number}}}", argument) for text in (needle, asked))
        characters, answers = (), ()
        if _CHARACTER in needle:
            characters = tuple(row["character_set"])
        else:
            answers = (test["gold_answers"],) if isinstance(test["gold_answers"], str) else tuple(test["gold_answers"])
        if not characters + answers:
            raise ValueError("a needle without an answer")
        yield Needle(needle, asked, characters, answers)


def build(file: str, name: str, materials: Materials, format: PromptFormat, root: pathlib.Path) -> NoLiMa | None:
    """The questions of a needle set in the books of a folder; None without the set, and `UserError` without a book."""
    found: list[Needle] = []
    for path in matching(root, (f"**/{file}",)):
        for place, row in records(path):
            with laid_out(place, row):
                found += needles(row)
    if not found:
        return None
    books = [Book(path.read_text("utf-8"), str(path)) for path in matching(root, BOOKS)]
    if not books:
        raise UserError(f"{name} has no book to put needles into: {root} has no {' or '.join(BOOKS)}; fetch NoLiMa's haystack, too")
    config = materials.config
    return NoLiMa(name, format, config.questions, config.seed, found, books, config.depths)


PARTS: Mapping[str, Fitted] = {part: Fitted((f"**/{file}", *BOOKS), functools.partial(build, file)) for part, file in SETS.items()}
