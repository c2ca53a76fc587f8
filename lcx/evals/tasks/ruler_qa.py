"""RULER's question answering (Hsieh et al., 2404.06654): a real question, whose document stands among many others.

The files are the user's: SQuAD's JSON (also that of XQuAD and others with its layout), or HotpotQA's distractor JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.files import refuse_lfs_pointer
from lcx.evals.base import Item, Materials
from lcx.evals.text.formats import Sample
from lcx.evals.text.matching import any_contained, cleaned
from lcx.evals.text.questions import Draw, TextQuestions

FAITHFUL_SEED = 42
SOURCES = {
    "qa_1": "SQuAD 2.0's dev-v2.0.json",
    "qa_2": "HotpotQA's hotpot_dev_distractor_v1.json",
}
"""What RULER reads."""


class Question(NamedTuple):
    """A question, its answers, the numbers of its documents, and those of documents that look alike (of the same article)."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    similar: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A file's documents and questions."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]

    @functools.cached_property
    def digest(self) -> str:
        """Sixteen hex digits that change with any of it."""
        return hashlib.sha256(repr((self.documents, self.questions)).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class DocumentQuestions(TextQuestions):
    """The question's own documents among others, drawn from the file; a unit is a word of these, the last of which is cut.
    With `faithful` a unit is a document, the question's own included.

    Found if any of the answers stands in the output. Chance is about 0.
    """

    setting: str = ""
    reading: Reading = Reading((), ())

    answer_tokens = 32
    units_per_1024 = 128

    @classmethod
    def sources(cls, materials: Materials, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The file that `evals.questions.<setting>` names."""
        setting = settings["setting"]
        path = materials.given(setting)
        if path is None:
            missing = f"evals.questions.{setting} names no file, such as {SOURCES[setting]}"
            if settings["name"] in materials.config.tasks:
                raise UserError(f"{settings['name']} asks about documents, but {missing}")
            warn(f"{settings['name']} is left out: {missing}")
            return None
        return {"reading": read(path, f"evals.questions.{setting}")}

    def step(self, length: int) -> int:
        """Ten whole documents."""
        return 10

    def compose(self, draw: Draw, units: int) -> Sample:
        """`faithful` takes the questions in the order of the file and shuffles every sample's documents alike."""
        rng, questions, faithful = draw.rng, self.reading.questions, self.settings.faithful
        question = questions[draw.number % len(questions)] if faithful else rng.choice(questions)
        others = self._whole(rng, question, units - len(question.gold)) if faithful else self._words(rng, question, units)
        documents = [*(self.reading.documents[i] for i in question.gold), *others]
        (random.Random(FAITHFUL_SEED) if faithful else random.Random(rng.random())).shuffle(documents)
        asked = "Answer the question from the given documents. Give only the answer and nothing else."
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        prompt = f"{asked}\n\nThese are the given documents.\n\n{listed}\n\n{asked}\n\nQuestion: {question.text}"
        return Sample(prompt, " Answer:", question.answers)

    def score(self, item: Item, output: str) -> float:
        """1 if any of the answers is part of the output."""
        return any_contained(cleaned(output), item.references)

    def _words(self, rng: random.Random, question: Question, words: int) -> list[str]:
        """Other documents with that many words in total, the last one cut."""
        found: list[str] = []
        for text in self._others(rng, question):
            listed = text.split()
            found.append(text if len(listed) <= words else " ".join(listed[:words]))
            words -= len(listed)
            if words <= 0:
                break
        return found

    def _whole(self, rng: random.Random, question: Question, count: int) -> list[str]:
        """That many other documents."""
        return list(itertools.islice(self._others(rng, question), max(0, count)))

    def _others(self, rng: random.Random, question: Question) -> Iterator[str]:
        """Other documents, those that look alike first, then the rest of the file at random, then all of them again."""
        own = {*question.gold, *question.similar}
        rest = [i for i in range(len(self.reading.documents)) if i not in own]
        order = [*rng.sample(question.similar, len(question.similar)), *rng.sample(rest, len(rest))]
        return (self.reading.documents[i] for i in itertools.cycle(order))


def read(path: str, setting: str) -> Reading:
    """The documents and answerable questions of a file; raises `UserError` if it is missing or has another layout."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"{setting}={path!r} does not exist or is not a file; give {SOURCES[setting.rsplit('.', 1)[1]]} or one like it"
        )
    refuse_lfs_pointer(file)
    return _read(str(file), setting)


@functools.lru_cache(maxsize=4)
def _read(path: str, setting: str) -> Reading:
    try:
        values = json.loads(pathlib.Path(path).read_text("utf-8"))
        reading = _squad(values["data"]) if isinstance(values, Mapping) else _hotpot(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{setting}={path!r} is laid out neither like SQuAD nor like HotpotQA ({what}); give another file"
        ) from error
    if not reading.questions:
        raise UserError(f"{setting}={path!r} has no question with an answer; give another file")
    if any(len(reading.documents) <= len(question.gold) for question in reading.questions):
        raise UserError(
            f"{setting}={path!r} has no documents but those of one question; give a file with others to put around them"
        )
    return reading


def _squad(articles: Any) -> Reading:
    documents: list[str] = []
    questions = []
    for article in articles:
        first = len(documents)
        documents += [paragraph["context"] for paragraph in article["paragraphs"]]
        for i, paragraph in enumerate(article["paragraphs"], first):
            similar = tuple(j for j in range(first, len(documents)) if j != i)
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible", False):
                    questions.append(Question(asked["question"], answers, (i,), similar))
    return Reading(tuple(documents), tuple(questions))


def _hotpot(items: Any) -> Reading:
    number: dict[str, int] = {}
    questions = []
    for item in items:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]}
        here = {title: number.setdefault(text, len(number)) for title, text in texts.items()}
        needed = {title for title, _ in item["supporting_facts"]} & here.keys()
        gold = tuple(here[title] for title in here if title in needed)
        similar = tuple(here[title] for title in here if title not in needed)
        questions.append(Question(item["question"], (item["answer"],), gold, similar))
    return Reading(tuple(number), tuple(questions))
