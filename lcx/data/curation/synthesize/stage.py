"""Synthesis as a stage of a curation: from curated sources to ones that a model, or a generated task, makes of them.

Layout: `NAME/00000.jsonl`, …, rows as those of curated documents or with `messages`, each with the `document` that it was made of;
`generated.jsonl` holds the answers by the hash of model, settings and request. A source is made in three passes over its documents,
of which the first counts, the second asks for what is missing and the third writes; requests follow from documents alone, so a
rerun goes on where it was killed.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.data.curation.answers import Answers, key_of
from lcx.data.curation.assemble.library import Library
from lcx.data.curation.synthesize import tasks
from lcx.data.curation.synthesize.generator import BYTES_PER_TOKEN, Answer, Generator, GeneratorFactory, to_plain, tokens
from lcx.data.curation.synthesize.methods import Draft, Method, Unusable, build
from lcx.data.curation.synthesize.settings import GeneratorConfig, SynthesizeConfig
from lcx.data.curation.tally import SAMPLE_CHARS
from lcx.data.sources.sources import InMemorySource, Subset
from lcx.data.tokenizers import tokenizers

GENERATED = "generated.jsonl"
"""Answers, kept in the curation's folder unless the config names another file."""
WINDOW = 256
"""Requests after which it is judged whether the model's answers are of use."""

Note = Callable[[str, str], None]
"""Called with the name of a source and what to say of it."""


class Synthesizer:
    """The synthesised sources of a curation, with the model that writes them; `fingerprint` changes with that.

    `factory` builds it. Raises `UserError` if a source needs a model and there is none.
    """

    def __init__(
        self, configs: Mapping[str, SynthesizeConfig], config: GeneratorConfig | None, factory: GeneratorFactory | None
    ) -> None:
        self._configs, self._config, self._generator = configs, config, None
        if config is not None and any(one.asks for one in configs.values()):
            if factory is None:
                raise UserError("config.generator needs a caller that knows models; lcx data curate does")
            self._generator = factory(config)

    @property
    def fingerprint(self) -> str | None:
        """That of the model, None without one."""
        return self._generator.fingerprint if self._generator else None

    def count(self, sources: Sequence[str], folder: pathlib.Path, work: pathlib.Path) -> dict[str, dict[str, Any]]:
        """What `run` would ask, by source: different `requests`, those `answered` before, and tokens of the others, estimated."""
        makers = self._makers(sources, folder, work)
        return {name: maker.count() for name, maker in makers if isinstance(maker, _Asked)}

    def run(
        self, sources: Sequence[str], folder: pathlib.Path, work: pathlib.Path, shard: int, samples: int, note: Note
    ) -> dict[str, Any]:
        """Write every source, at least `shard` bytes a file, into `folder`, and return what the report says of each.

        `sources` are the curated ones, for configs that name none. The report shows `samples` answers of each. Raises `UserError`
        for a model that does not answer, or gives too many answers that cannot be used; what came until then is kept.
        """
        found = {}
        self._clear(folder, work)
        for name, maker in self._makers(sources, folder, work):
            if isinstance(maker, _Asked):
                maker.ask(note)
            found[name] = maker.write(folder / name, shard, samples)
        return found

    def _clear(self, folder: pathlib.Path, work: pathlib.Path) -> None:
        """Remove what an earlier start wrote, maybe under other settings; its answers stay."""
        path = work / ".synthesize.json"
        for name in json.loads(path.read_bytes()) if path.exists() else ():
            shutil.rmtree(folder / name, ignore_errors=True)
        write_atomically(path, json.dumps(sorted(self._configs)))

    def _makers(self, sources: Sequence[str], folder: pathlib.Path, work: pathlib.Path) -> Iterator[tuple[str, _Asked | _Task]]:
        answers = None
        for name, config in self._configs.items():
            library = Library(folder, config.sources or sources, work, 1)
            if not config.asks:
                yield name, _Task(name, config, library)
                continue
            assert self._config is not None and self._generator is not None
            path = pathlib.Path(self._config.cache).expanduser() if self._config.cache else folder / GENERATED
            answers = answers or _Kept(path, self._generator)
            yield name, _Asked(name, config, library, self._config, answers)


class _Kept:
    """Answers that are asked for once."""

    def __init__(self, path: pathlib.Path, generator: Generator) -> None:
        self.path, self._generator, self._answers = path, generator, Answers(path)

    def key(self, request: str) -> str:
        """What the answer to a request is kept under."""
        return key_of(f"{self._generator.fingerprint}\0{request}")

    def has(self, request: str) -> bool:
        """Whether it has been answered."""
        return self.key(request) in self._answers.known

    def get(self, request: str) -> Answer:
        """Its answer."""
        return Answer(**self._answers.known[self.key(request)])

    def ask(self, requests: Sequence[str]) -> None:
        """Ask for what is missing; of requests that make one batch for all of them, so that answers stay the same."""
        missing: list[str] = []
        for first in range(0, len(requests), self._generator.batch_size):
            batch = requests[first : first + self._generator.batch_size]
            missing += [] if all(map(self.has, batch)) else batch
        if not missing:
            return
        with self._answers.open():
            for found in self._generator(missing):
                for number, answer in found.items():
                    if not self.has(missing[number]):
                        self._answers.add(self.key(missing[number]), to_plain(answer))

    def sort(self) -> None:
        """Bring the file into an order that does not depend on who answered first."""
        self._answers.rewrite()


class _Asked:
    """A source that a model writes."""

    def __init__(self, name: str, config: SynthesizeConfig, library: Library, model: GeneratorConfig, kept: _Kept) -> None:
        self._name, self._config, self._library, self._model, self._kept = name, config, library, model, kept
        self._method: Method = build(config)
        self._left: dict[int, str] = {}
        self._chosen = self._choose()

    def count(self) -> dict[str, Any]:
        """What is to be asked: documents, different requests, those answered before, tokens of the others by their bytes."""
        keys: set[str] = set()
        answered = size = 0
        for request in itertools.chain.from_iterable(draft.requests for draft in self._drafts()):
            if (key := self._kept.key(request)) in keys:
                continue
            keys.add(key)
            answered += self._kept.has(request)
            size += 0 if self._kept.has(request) else len(request.encode())
        tokens = -(-size // BYTES_PER_TOKEN)
        return {"documents": len(self._chosen), "requests": len(keys), "answered": answered, "input_tokens": tokens}

    def ask(self, note: Note) -> None:
        """Get all answers; raises `UserError` for a model that does not answer, or not to the purpose."""
        counted = self.count()
        note(self._name, asking(counted, self._model.where))
        asked = 0
        reasons: collections.Counter[str] = collections.Counter()
        example = ""
        requests = ((draft, i) for draft in self._drafts() for i in range(len(draft.requests)))
        while window := list(itertools.islice(requests, WINDOW)):
            self._kept.ask(list(dict.fromkeys(draft.requests[i] for draft, i in window)))
            for draft, i in window:
                asked += 1
                if reason := self._read(draft, i)[1]:
                    reasons[reason] += 1
                    example = example or self._kept.get(draft.requests[i]).text
            if reasons.total() > self._config.max_failed * asked:
                self._kept.sort()
                raise UserError(self._nonsense(asked, reasons, example))
            if counted["answered"] < counted["requests"]:
                note(self._name, f"{asked:,} requests answered, {reasons.total():,} of no use")
        self._kept.sort()

    def write(self, folder: pathlib.Path, shard: int, samples: int) -> dict[str, Any]:
        """Write the rows, and return what the report says."""
        outcomes: collections.Counter[str] = collections.Counter()
        used: dict[str, tuple[int, int, bool]] = {}
        shown = {True: _Samples(samples), False: _Samples(samples)}

        def lines() -> Iterator[tuple[bytes, int]]:
            written = 0
            for number, draft in zip(self._chosen, self._drafts(), strict=True):
                found, reasons = [], []
                for i, request in enumerate(draft.requests):
                    read, reason = self._read(draft, i)
                    found.append(read)
                    reasons.append(reason)
                    outcomes[reason or "used"] += 1
                    key, answer = self._kept.key(request), self._kept.get(request)
                    used[key] = tokens(request, answer)
                    shown[not reason].add(key, lambda d=draft, i=i, r=read, w=reason: self._sample(d, i, r, w))
                try:
                    row = self._method.write(draft, found, reasons, f"{self._name}:{written}", self._name)
                except Unusable as error:
                    self._left[number] = str(error)
                    continue
                written += 1
                yield row

        documents, size = write(folder, lines(), shard)
        sums = [sum(values) for values in zip(*used.values(), strict=True)] if used else [0, 0, 0]
        return {
            **_about(self._config, self._library),
            "model": self._model.model,
            "out": {"documents": documents, "bytes": size},
            "left_over": self._left_over(),
            "requests": len(used),
            "answers": dict(sorted(outcomes.items(), key=lambda item: (item[0] != "used", item[0]))),
            "tokens": {"input": sums[0], "output": sums[1], "estimated_requests": sums[2]},
            "cost": self._model.cost(sums[0], sums[1]),
            "samples": [*shown[True].found, *shown[False].found],
        }

    def _choose(self) -> list[int]:
        """Numbers of the documents that are used, in order: those with the smallest hashes that the method can use."""

        def rank(number: int) -> bytes:
            named = f"{self._config.seed}\0{self._source(number)}\0{self._library.names[number]}"
            return hashlib.blake2b(named.encode("utf-8", "surrogatepass"), digest_size=16).digest()

        chosen: list[int] = []
        for number in sorted(range(len(self._library)), key=rank):
            if len(chosen) == self._config.documents:
                self._left[number] = "not_drawn"
                continue
            try:
                self._draft(number)
            except Unusable as error:
                self._left[number] = str(error)
            else:
                chosen.append(number)
        return sorted(chosen)

    def _drafts(self) -> Iterator[Draft]:
        return map(self._draft, self._chosen)

    def _draft(self, number: int) -> Draft:
        text = self._library.read(number, 0, int(self._library.sizes[number])).decode()
        return self._method.draft(self._source(number), self._library.names[number], text)

    def _source(self, number: int) -> str:
        return self._library.sources[self._library.source[number]]

    def _read(self, draft: Draft, number: int) -> tuple[Any, str]:
        """What an answer says, None where it cannot be used, and why not."""
        answer = self._kept.get(draft.requests[number])
        if answer.fault is not None:
            return None, answer.fault
        try:
            return self._method.read(draft, number, answer), ""
        except Unusable as error:
            return None, str(error)

    def _sample(self, draft: Draft, number: int, read: Any, reason: str) -> dict[str, str]:
        """What the model saw and what came of it, for a reader."""
        answer = self._kept.get(draft.requests[number]).text
        found = answer if reason else read if isinstance(read, str) else "\n".join(read.values())
        shown = self._method.shown(draft, number, SAMPLE_CHARS)
        return {"name": draft.name, "outcome": reason or "used", "before": shown, "after": found[: 2 * SAMPLE_CHARS]}

    def _left_over(self) -> dict[str, dict[str, int]]:
        left: dict[str, dict[str, int]] = {}
        for number, reason in sorted(self._left.items()):
            of = left.setdefault(reason, {"documents": 0, "bytes": 0})
            of["documents"] += 1
            of["bytes"] += int(self._library.sizes[number])
        return left

    def _nonsense(self, asked: int, reasons: collections.Counter[str], example: str) -> str:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        return (
            f"{self._model.where} gave no answer of use to {reasons.total():,} of {asked:,} requests of "
            f"config.synthesize.{self._name} ({counts}), but {' '.join(example.split())[:80]!r}; change the model or the prompt, "
            f"or raise max_failed={self._config.max_failed:g}; its answers are kept in {self._kept.path}"
        )


class _Task:
    """A source of rows of a generated task."""

    def __init__(self, name: str, config: SynthesizeConfig, library: Library) -> None:
        self._name, self._config, self._library = name, config, library

    def write(self, folder: pathlib.Path, shard: int, samples: int) -> dict[str, Any]:
        """Write the rows, and return what the report says."""
        config, library = self._config, self._library
        if not len(library):
            raise UserError(
                f"config.synthesize.{self._name} has no text to make rows of: no document of {', '.join(library.sources)} was kept"
            )
        tokenizer = tokenizers.load(config.task.tokenizer)
        texts = (library.read(number, 0, int(size)) for number, size in enumerate(library.sizes))
        ids = [tokenizer.encode(text) for text in texts]
        haystack = Subset(InMemorySource(library.names, ids, [0] * len(ids), tokenizer.vocab_size), np.arange(len(ids)))
        try:
            lines = tasks.written(config.task, tokenizer, haystack, self._name, config.documents, config.seed)
            documents, size = write(folder, lines, shard)
        except UserError as error:
            raise UserError(f"config.synthesize.{self._name}: {error}") from error
        out = {"documents": documents, "bytes": size}
        return {**_about(config, library), "task": config.task.kind, "out": out, "left_over": {}}


@dataclasses.dataclass
class _Samples:
    """The samples with the smallest keys, at most `most`."""

    most: int
    keys: list[str] = dataclasses.field(default_factory=list)
    found: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, key: str, sample: Callable[[], dict[str, str]]) -> None:
        place = bisect.bisect_left(self.keys, key)
        if place < self.most:
            self.keys.insert(place, key)
            self.found.insert(place, sample())
            del self.keys[self.most :], self.found[self.most :]


def asking(counted: Mapping[str, Any], model: str) -> str:
    """How much is to be asked, as a sentence."""
    left = counted["requests"] - counted["answered"]
    known = f", {counted['answered']:,} more were answered before" if counted["answered"] else ""
    size = f", about {counted['input_tokens']:,} tokens" if left else ""
    return f"{left:,} requests about {counted['documents']:,} documents to {model}{size}{known}"


def write(folder: pathlib.Path, lines: Iterator[tuple[bytes, int]], shard: int) -> tuple[int, int]:
    """Write lines into files of at least `shard` bytes of text each, and return how many there are, and their text in bytes."""
    documents = size = number = here = 0
    rows: list[bytes] = []
    for line, length in lines:
        rows.append(line)
        documents, size, here = documents + 1, size + length, here + length
        if here >= shard:
            write_atomically(folder / f"{number:05d}.jsonl", b"".join(rows))
            number, here = number + 1, 0
            rows.clear()
    if rows:
        write_atomically(folder / f"{number:05d}.jsonl", b"".join(rows))
    return documents, size


def _about(config: SynthesizeConfig, library: Library) -> dict[str, Any]:
    read = {"documents": len(library), "bytes": int(library.sizes.sum())}
    return {"method": config.method, "chat": config.is_chat, "sources": list(library.sources), "in": read}
