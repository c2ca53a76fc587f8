"""Scores the documents that filters and duplicates leave, shard by shard, and drops those that their source does not keep.

Each shard's column of a score is a file in `work/`. Legend: D documents.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lcx.core.files import write_atomically
from lcx.data.curation import scores, select
from lcx.data.curation.config import CurationConfig
from lcx.data.curation.scores import Column, Learner, Scorer
from lcx.data.curation.store import Documents, Drop, Stored
from lcx.data.curation.tally import SAMPLE_CHARS


class Scored:
    """The scores of all documents: `values` float32 `[D]` by name, NaN where there is none, and what the report says of them."""

    def __init__(self, config: CurationConfig, documents: Documents) -> None:
        self._config, self._documents = config, documents
        self.values = {name: np.full(len(documents.sizes), np.nan, np.float32) for name in sorted(config.scores)}
        self.errors: dict[str, dict[int, tuple[str, str]]] = {name: {} for name in self.values}
        self.learned: dict[str, Any] = {}
        self._summaries: dict[tuple[str, str], dict[str, Any]] = {}
        self._shown: dict[int, list[tuple[str, int]]] = collections.defaultdict(list)

    def summarise(self) -> None:
        """Prepare the report, while all documents that were scored are left."""
        for source in self._config.names:
            numbers, names = self._documents.of(source), self._documents.names(source)
            places = {number: place for place, number in enumerate(numbers.tolist())}
            for name in self._config.scores_of(source):
                errors = {places[number]: error for number, error in self.errors[name].items() if number in places}
                column = Column(self.values[name][numbers], errors)
                content, shown = select.summary(self._config.scores[name], column, names, self._config.samples)
                self._summaries[source, name] = {**content, "samples": [[] for _ in range(10)]}
                for place, decile in sorted(shown.items()):
                    self._shown[int(numbers[place])].append((name, decile))

    def drops(self) -> dict[int, Drop]:
        """Number -> why: documents that made a scorer fail, and those that their source does not keep."""
        found: dict[int, Drop] = {}
        for name, errors in self.errors.items():
            for number, (reason, message) in errors.items():
                found.setdefault(number, Drop("score", f"{name}_{reason}", details={"error": message[:SAMPLE_CHARS]}))
        for source in self._config.names:
            numbers = self._documents.of(source)
            values = {name: column[numbers] for name, column in self.values.items()}
            for place, reason in select.drops(self._config.sources[source].keep, values, self._documents.sizes[numbers]).items():
                number = int(numbers[place])
                found.setdefault(number, Drop("select", reason, details={"scores": self.of(source, number)}))
        return found

    def of(self, source: str, number: int) -> dict[str, float | None]:
        """A document's scores by name."""
        return {name: scores.number(self.values[name][number]) for name in self._config.scores_of(source)}

    def look(self, source: str, number: int, row: bytes) -> None:
        """Keep the start of a document's text if the report shows it."""
        for name, decile in self._shown.get(number, ()):
            read = json.loads(row)
            sample = {"name": read["name"], "value": scores.number(self.values[name][number]), "text": read["text"][:SAMPLE_CHARS]}
            self._summaries[source, name]["samples"][decile].append(sample)

    def marked(self, source: str, number: int, row: bytes) -> bytes:
        """A line of JSONL with the document's scores in it, in front of the text."""
        if not self._config.scores_of(source):
            return row
        # A quotation mark inside of the name has a backslash in front, so that this is where the text begins.
        at = row.index(b', "text": "')
        return row[:at] + b', "scores": ' + json.dumps(self.of(source, number)).encode() + row[at:]

    def report(self, source: str) -> dict[str, Any]:
        """What the report says of the scores of a source, by name."""
        return {name: self._summaries[source, name] for name in self._config.scores_of(source)}


def run(
    config: CurationConfig,
    scorers: Mapping[str, Scorer | Learner],
    documents: Documents,
    report: Callable[[str, str, int, int, int], None],
) -> Scored:
    """Every score of every document that is left and belongs to one of the score's sources.

    `report` is called after every shard with its source, what was done, for how many shards and bytes, and bytes in this start.
    """
    scored = Scored(config, documents)
    for name, scorer in scorers.items():
        shards = [i for i, stored in enumerate(documents.shards) if name in config.scores_of(stored.source)]
        path = shards and documents.shards[shards[0]].folder.parent / f"learned-{name}.json"
        todo = [i for i in shards if not _path(documents.shards[i], name).exists()]
        if isinstance(scorer, Learner) and shards:
            if todo or not path.exists():
                scorer, content = scorer.learn(lambda shards=shards: _corpus(documents, shards), path.parents[1])
                write_atomically(path, json.dumps(content))
            scored.learned[name] = json.loads(path.read_bytes())
        done = fresh = 0
        for count, shard in enumerate(shards, 1):
            stored, numbers = documents.shards[shard], documents.in_shard(shard)
            if shard in todo:
                names, texts = zip(*documents.texts(shard), strict=True) if len(numbers) else ((), ())
                column = scores.score(name, scorer, texts, names)
                write_atomically(_path(stored, name), column.to_json())
                fresh += int(documents.sizes[numbers].sum())
            column = Column.from_json(_path(stored, name).read_bytes())
            scored.values[name][numbers] = column.values
            scored.errors[name].update({int(numbers[place]): error for place, error in column.errors.items()})
            done += int(documents.sizes[numbers].sum())
            report(stored.source, f"scored by {name}", count, done, fresh)
    scored.summarise()
    return scored


def _corpus(documents: Documents, shards: list[int]) -> Iterator[tuple[str, str]]:
    for shard in shards:
        yield from documents.texts(shard)


def _path(stored: Stored, name: str):
    return stored.path(f".score-{name}.json")
