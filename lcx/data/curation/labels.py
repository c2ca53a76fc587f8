"""Which documents are good, for a classifier to learn from: from a file, from a model behind an endpoint, or from another score."""

from __future__ import annotations

import dataclasses
import heapq
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core.configs import not_negative, positive
from lcx.core.errors import UserError
from lcx.core.files import refuse_lfs_pointer
from lcx.data.curation.answers import Answers, key_of
from lcx.data.curation.scores import Corpus, Learner, ScoreConfig, ScorerFactory, build_scorers, score

RUBRIC = """Grade how much a language model would learn from the text below.
5: coherent from start to end, correct, rich in content, as in a good book, a textbook or well-made source code
4: coherent and rich, with small flaws
3: readable and on one subject, but thin, or with parts that do not belong
2: fragments, lists without context, advertising, or text that repeats itself
1: hardly any sentence that means something
0: noise, menus, boilerplate or words without order
Answer with the grade alone."""
ANSWERS = "answers.jsonl"
"""Answers of endpoints, kept in the curation's folder unless the config names another file."""
_GRADE = re.compile(r"\W*(?:(?:the )?(?:grade|score|rating|answer)\b(?: is\b)?)?\W*(\d+(?:\.\d+)?)(?!\w|\.\d)", re.IGNORECASE)
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class FileLabels:
    """A JSONL file, a row a document: `text`, or the `name` that a curated row has, and a number in `field`.

    Good are those of at least `threshold`.
    """

    path: str = ""
    field: str = "label"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError('labels.file.path is missing; name a JSONL file with rows such as {"name": …, "label": 1}')


@dataclasses.dataclass(frozen=True)
class EndpointLabels:
    """Grades from 0 to 5 by a model behind an endpoint that speaks OpenAI's protocol; good from `threshold`.

    It is asked about `documents` of the corpus, and of one with more than `excerpt_chars` characters sees start, middle and end.
    Answers are kept in `cache` (empty: in the curation's folder) and asked for once. An answer that does not begin with a grade
    labels nothing; more than the share `max_unread` of such answers is an error.
    At most `concurrency` requests are open at a time; one that takes more than `timeout` seconds or fails is sent again `retries`
    times.
    """

    url: str = ""
    model: str = ""
    rubric: str = RUBRIC
    threshold: float = 3.0
    documents: int = 2000
    excerpt_chars: int = 4000
    max_unread: float = 0.2
    concurrency: int = 4
    timeout: float = 600.0
    retries: int = 5
    cache: str = ""

    def __post_init__(self) -> None:
        positive("labels.endpoint", documents=self.documents, excerpt_chars=self.excerpt_chars, concurrency=self.concurrency)
        positive("labels.endpoint", timeout=self.timeout)
        not_negative("labels.endpoint", max_unread=self.max_unread, retries=self.retries)
        if not self.url or not self.model:
            raise UserError("labels.endpoint needs url and model, such as http://localhost:8000/v1 and the name of a model there")


@dataclasses.dataclass(frozen=True)
class ScoreLabels:
    """Another score of `documents` of the corpus, such as a likelihood ratio: the highest are good, the lowest are not."""

    score: ScoreConfig
    good_share: float = 0.3
    bad_share: float = 0.3
    documents: int = 2000

    def __post_init__(self) -> None:
        positive("labels.score", documents=self.documents, good_share=self.good_share, bad_share=self.bad_share)
        if self.good_share + self.bad_share > 1:
            raise UserError(
                f"labels.score: good_share={self.good_share} and bad_share={self.bad_share} come to more than 1; lower one"
            )


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Where labels come from: one of the three."""

    file: FileLabels | None = None
    endpoint: EndpointLabels | None = None
    score: ScoreLabels | None = None

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.file, self.endpoint, self.score)) != 1:
            raise UserError("labels has to have one of file, endpoint and score; set one of them")


Ask = Callable[[Sequence[str]], Iterator[dict[int, str]]]
"""Prompts to a model's answers, by number of the prompt, as they come."""
AskFactory = Callable[[EndpointLabels], Ask]


class Labels(dict[str, bool]):
    """Key of a text (`key_of`) -> whether it is good. `texts` are those that came with their labels; `counts` is for the report."""

    def __init__(self, found: Mapping[str, bool], texts: Mapping[str, str], counts: Mapping[str, Any]) -> None:
        super().__init__(found)
        self.texts, self.counts = dict(texts), dict(counts)


def from_file(config: FileLabels, corpus: Corpus) -> Labels:
    """Labels of a file; raises `UserError` for one that cannot be read or is about no document."""
    by_name: dict[str, bool] = {}
    found: dict[str, bool] = {}
    texts: dict[str, str] = {}
    rows = 0
    for number, row in _rows(config.path):
        value = row.get(config.field)
        known = "text" if isinstance(row.get("text"), str) else "name"
        if not isinstance(value, int | float) or not isinstance(row.get(known), str):
            raise UserError(f"{config.path}:{number} has no name or text, or no number in {config.field!r}; give each row both")
        rows += 1
        good = value >= config.threshold
        if known == "text":
            texts[key := key_of(row["text"])] = row["text"]
            found[key] = good
        else:
            by_name[row["name"]] = good
    matched = set()
    if by_name:
        for name, text in corpus():
            if name in by_name:
                matched.add(name)
                found[key_of(text)] = by_name[name]
    if not found:
        what = f"none of its {len(by_name)} names is that of a document" if by_name else "it has no rows"
        raise UserError(f"{config.path} labels nothing here: {what}; take names from the rows of a curated folder, or give texts")
    return Labels(found, texts, {"from": "file", "rows": rows, "names_without_document": len(by_name) - len(matched)})


def from_endpoint(config: EndpointLabels, corpus: Corpus, ask: Ask, folder: pathlib.Path) -> Labels:
    """Labels of a model's grades; raises `UserError` where too many answers are none, and what `ask` raises."""
    sample = _sample(corpus, config.documents, lambda text: excerpt(text, config.excerpt_chars))
    prompts = {key: f"{config.rubric}\n\nText:\n{part}\n\nGrade:" for key, part in sample}
    path = pathlib.Path(config.cache).expanduser() if config.cache else folder / ANSWERS
    cache = Answers(path)
    places = {key: key_of(f"{config.model}\0{prompt}") for key, prompt in prompts.items()}
    missing = [key for key in prompts if places[key] not in cache.known]
    if missing:
        with cache.open():
            for answers in ask([prompts[key] for key in missing]):
                for number, answer in answers.items():
                    cache.add(places[missing[number]], answer)
    cache.rewrite()
    grades = {key: grade_of(cache.known.get(place, "")) for key, place in places.items()}
    found = {key: grade >= config.threshold for key, grade in grades.items() if grade is not None}
    unread = len(grades) - len(found)
    if unread > config.max_unread * len(grades):
        example = next(cache.known.get(places[key], "") for key, grade in grades.items() if grade is None)
        raise UserError(
            f"{config.model} at {config.url} gave no grade for {unread} of {len(grades)} documents, but {example[:80]!r}; change "
            "labels.endpoint.rubric or the model"
        )
    shares = {str(grade): sum(one is not None and round(one) == grade for one in grades.values()) for grade in range(6)}
    return Labels(
        found, {}, {"from": "endpoint", "model": config.model, "requests": len(grades), "unread": unread, "grades": shares}
    )


def from_score(config: ScoreLabels, corpus: Corpus, factories: Mapping[str, ScorerFactory]) -> Labels:
    """Labels of another score's extremes; raises `UserError` for a score that is not there or gives nothing."""
    scorer = build_scorers({"labels": config.score}, factories)["labels"]
    if isinstance(scorer, Learner):
        raise UserError(f"labels.score.score.kind={config.score.kind!r} learns from labels itself; use a score that does not")
    keys, values = [], []
    sample = _sample(corpus, config.documents, lambda text: text)
    for at in range(0, len(sample), _BATCH):
        keys += [key for key, _ in sample[at : at + _BATCH]]
        values.append(score("labels", scorer, [text for _, text in sample[at : at + _BATCH]]).values)
    column = np.concatenate([np.zeros(0, np.float32), *values])
    known = np.flatnonzero(~np.isnan(column))
    order = known[np.argsort(column[known], kind="stable")]
    bad, good = int(config.bad_share * len(order)), int(config.good_share * len(order))
    if not bad or not good:
        raise UserError(
            f"labels.score gave a number for {len(order)} of {len(column)} documents, too few to tell good from bad ones"
        )
    found = {keys[i]: False for i in order[:bad]} | {keys[i]: True for i in order[len(order) - good :]}
    counts = {"from": "score", "kind": config.score.kind, "documents": len(column), "missing": len(column) - len(known)}
    return Labels(found, {}, counts)


def grade_of(answer: str) -> float | None:
    """The grade from 0 to 5 that an answer begins with, maybe behind a word such as `Grade:`; None if there is none."""
    found = _GRADE.match(answer)
    return float(found[1]) if found and float(found[1]) <= 5 else None


def excerpt(text: str, most: int) -> str:
    """A text of at most `most` characters; of a longer one start, middle and end."""
    if len(text) <= most:
        return text
    part, middle = max(1, most // 3), len(text) // 2
    return "\n[...]\n".join([text[:part], text[middle - part // 2 : middle - part // 2 + part], text[-part:]])


def _sample(corpus: Corpus, most: int, part: Callable[[str], str]) -> list[tuple[str, str]]:
    """Key and part of at most so many different texts, those with the smallest keys, which are a fair draw."""
    heap: list[tuple[int, str, str]] = []
    inside: set[str] = set()
    for _, text in corpus():
        key = key_of(text)
        rank = -int(key, 16)
        if key in inside or (len(heap) == most and rank < heap[0][0]):
            continue
        inside.add(key)
        entry = (rank, key, part(text))
        if len(heap) < most:
            heapq.heappush(heap, entry)
        else:
            inside.discard(heapq.heappushpop(heap, entry)[1])
    return [(key, text) for _, key, text in sorted(heap, reverse=True)]


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = pathlib.Path(path).expanduser()
    try:
        refuse_lfs_pointer(file)
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f'{path}:{number} is no JSON object; give a row such as {{"name": …, "label": 1}}')
                    yield number, row
    except (OSError, ValueError) as error:
        raise UserError(f"labels.file.path={path!r} cannot be read ({error}); name a JSONL file of labels") from error
