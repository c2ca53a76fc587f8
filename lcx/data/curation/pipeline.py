"""From sources to curated JSONL files: read, judge documents by themselves, compare and score the rest, write, make new sources.

Layout of the folder: `curation.json` (whose folder it is), `SOURCE/00000.jsonl`, … (what stays), `report.json` (written last: where
it is, all is done), and until then `work/`, where each judged shard is kept; a rerun after a kill takes shards from there. Bytes
depend on sources and config alone, never on the number of workers or on interruptions.

Legend: D documents, B buckets.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lcx.core import manifest
from lcx.core.configs import plain
from lcx.core.errors import UserError
from lcx.core.files import opened_atomically, write_atomically
from lcx.data.curation import contamination, diversify, quality, scoring
from lcx.data.curation.assemble.stage import Assembler
from lcx.data.curation.config import CurationConfig
from lcx.data.curation.duplicates import first_come
from lcx.data.curation.embed import Embedder, EmbedderFactory, build_embedder
from lcx.data.curation.labels import AskFactory
from lcx.data.curation.scores import Learner, Scorer, ScorerFactory, build_scorers
from lcx.data.curation.shard import Shard, Unreadable, judge
from lcx.data.curation.store import FORMAT, META, REPORT, WORK, Documents, Drop, Drops, Stored, claimed, to_json
from lcx.data.curation.synthesize.generator import GeneratorFactory
from lcx.data.curation.synthesize.settings import identity
from lcx.data.curation.synthesize.stage import Synthesizer
from lcx.data.curation.tally import SAMPLE_CHARS, Tally
from lcx.data.curation.workers import Runner, ordered
from lcx.data.sources import documents

SYNTHESIS = ("synthesize", "generator", "generated_with")
"""What only the last stage depends on."""
SHARD_DOCUMENTS = 1 << 14
"""Documents after which a shard ends, however small they are."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What has been judged, or whatever else is `done`: shards and bytes of text, and bytes in this start, not an earlier one.

    A `note` is to be said as it is.
    """

    source: str
    shards: int
    bytes: int
    fresh_bytes: int
    done: str = "judged"
    note: str = ""


def curate(
    config: CurationConfig,
    out_dir: str | os.PathLike[str],
    workers: int = 1,
    report: Callable[[Progress], None] | None = None,
    scorers: Mapping[str, ScorerFactory] | None = None,
    embedders: Mapping[str, EmbedderFactory] | None = None,
    ask: AskFactory | None = None,
    run: Runner | None = None,
    generator: GeneratorFactory | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Curate the sources into `out_dir` and return the content of its `report.json`.

    `report` is called after every shard. `scorers`: kinds of scores beside `quality`; `embedders`: that of `hidden`, which needs a
    model; `ask`: asks an endpoint; `run`: judges shards elsewhere than in `workers` processes (`lcx.data.curation.cluster`);
    `generator`: builds the model that synthesis asks. With `dry_run` the model is not asked: unless all is done already, what
    comes back has `requests`, by source what it would be asked, and the next start goes on from there. Raises `UserError` for a
    source without documents, an evaluation file that cannot be read, a kind of score, an embedding or a model that is not there, a
    folder that holds something else or is being written, sources that changed in between, and a disk that is full.
    """
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    folder = pathlib.Path(out_dir).expanduser()
    patterns = config.decontaminate.paths
    forbidden = contamination.collect(patterns, config.decontaminate.ngram) if patterns else None
    others = dict(scorers or {})
    built = build_scorers(config.scores, {"quality": quality.factory(others, embedders or {}, ask), **others})
    embedder = build_embedder(config.diversity.embedding, embedders) if config.diversity else None
    assembler = Assembler(config.assemble, embedders or {})
    synthesizer = Synthesizer(config.synthesize, config.generator, generator)
    own = _identity(config, forbidden, built, embedder, assembler, synthesizer)
    try:
        with claimed(folder, own, late=SYNTHESIS):
            if not (folder / REPORT).exists():
                curation = _Curation(
                    config, folder, forbidden, built, embedder, assembler, synthesizer, workers, run, report or _say_nothing
                )
                content = curation.run(dry_run)
                if dry_run:
                    return content
                # What is written besides (pages, vectors) may be made again.
                names = [META, *(name for name in manifest.listed(folder) if name.endswith(".jsonl") and not name.startswith(WORK))]
                manifest.write(folder, names, given={REPORT: to_json(content)})
                write_atomically(folder / REPORT, to_json(content))
            shutil.rmtree(folder / WORK, ignore_errors=True)
            return json.loads((folder / REPORT).read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error}; fix that and rerun the same command, it resumes from there"
        ) from error


class _Curation:
    """One start of the command."""

    def __init__(
        self,
        config: CurationConfig,
        folder: pathlib.Path,
        forbidden: contamination.Forbidden | None,
        scorers: Mapping[str, Scorer | Learner],
        embedder: Embedder | None,
        assembler: Assembler,
        synthesizer: Synthesizer,
        workers: int,
        run: Runner | None,
        report: Callable[[Progress], None],
    ) -> None:
        self._config, self._folder, self._workers, self._report = config, folder, workers, report
        self._ordered = run or functools.partial(ordered, workers=workers)
        self._forbidden, self._scorers, self._embedder = forbidden, scorers, embedder
        self._assembler, self._synthesizer = assembler, synthesizer
        self._forbidden_path = folder / WORK / "forbidden.npz"
        self._tallies = {name: Tally(config.samples) for name in config.names}
        self._shards: list[Stored] = []
        self._bytes = self._fresh = 0

    def run(self, dry_run: bool) -> dict[str, Any]:
        """All stages; the content of the report, or in a dry run what would be asked."""
        (self._folder / WORK).mkdir(exist_ok=True)
        if self._forbidden is not None:
            self._forbidden.save(self._forbidden_path)
        self._judge()
        left = Documents(self._shards)
        drops = self._duplicates(left)
        scored = scoring.run(self._config, self._scorers, left, self._step)
        found = scored.drops()
        left.left[list(found)] = False
        drops.add(found)
        diversified = None
        if self._config.diversity is not None and self._embedder is not None:
            diversified = diversify.run(self._config.diversity, self._embedder, left, self._folder, self._step)
            drops.add(diversified.drops)
        kept = self._write(left, drops, scored, diversified)
        content = self._content(kept, scored)
        if diversified is not None:
            content["diversity"] = diversified.report()
        names, folder, work, shard = self._config.names, self._folder, self._folder / WORK, self._config.shard_bytes
        if self._config.assemble:
            content["assembled"] = self._assembler.run(names, folder, work, self._workers, shard)
        if dry_run:
            return {"requests": self._synthesizer.count(names, folder, work)}
        if self._config.synthesize:
            content["synthesized"] = self._synthesizer.run(names, folder, work, shard, self._config.samples, self._note)
        return content

    def _judge(self) -> None:
        """Judge the shards that are not yet in `work/`, and count all of them."""
        asked: collections.deque[tuple[Stored, str]] = collections.deque()
        for judged in self._ordered(judge, self._unjudged(asked)):
            stored, digest = asked.popleft()
            stored.write(judged, digest)
            self._count(stored, fresh=True)
        self._shards.sort(key=lambda stored: (self._config.names.index(stored.source), stored.number))

    def _unjudged(self, asked: collections.deque[tuple[Stored, str]]) -> Iterator[Shard]:
        """All shards without those in `work/`; `asked` gets the place of each, with the hash of its documents."""
        for name in self._config.names:
            number = 0
            for shard, digest in self._read(name):
                stored = Stored(self._folder / WORK / name, number)
                if stored.exists():
                    stored.check(digest, name, self._folder)
                    self._count(stored, fresh=False)
                else:
                    asked.append((stored, digest))
                    yield shard
                number += 1
            if Stored(self._folder / WORK / name, number).exists():
                raise UserError(f"source {name!r} has changed since {self._folder} was started; delete the folder and start again")

    def _read(self, name: str) -> Iterator[tuple[Shard, str]]:
        """A source in shards, each with a hash of its documents."""
        source = self._config.sources[name]
        found: list[tuple[str, bytes] | Unreadable] = []
        digest, size = hashlib.blake2b(digest_size=16), 0

        def refuse(where: str, reason: str, sentence: str) -> None:
            found.append(bad := Unreadable(where, reason, sentence))
            digest.update(repr(bad).encode("utf-8", "replace"))

        def cut() -> tuple[Shard, str]:
            shard = Shard(
                source=name,
                documents=list(found),
                filters=source.settings,
                minhash=self._config.minhash,
                forbidden=None if self._forbidden is None else str(self._forbidden_path),
                min_matches=self._config.decontaminate.min_matches,
                samples=self._config.samples,
            )
            found.clear()
            return shard, digest.hexdigest()

        for one in documents.read(source.source, refuse):
            found.append(one)
            digest.update(one[0].encode("utf-8", "replace") + len(one[1]).to_bytes(8, "little") + one[1])
            size += len(one[1])
            if size >= self._config.shard_bytes or len(found) >= SHARD_DOCUMENTS:
                yield cut()
                size = 0
        if found:
            yield cut()

    def _count(self, stored: Stored, fresh: bool) -> None:
        tally = stored.meta()["tally"]
        self._tallies[stored.source].add(tally)
        self._shards.append(stored)
        self._bytes += tally["bytes"]
        self._fresh += tally["bytes"] if fresh else 0
        self._report(Progress(stored.source, len(self._shards), self._bytes, self._fresh))

    def _step(self, source: str, done: str, shards: int, size: int, fresh: int) -> None:
        self._report(Progress(source, shards, size, fresh, done))

    def _note(self, source: str, note: str) -> None:
        self._report(Progress(source, len(self._shards), self._bytes, self._fresh, note=note))

    def _duplicates(self, left: Documents) -> Drops:
        """The duplicates among all documents, which are no longer `left`."""

        def column(row: int) -> np.ndarray:
            # Files are opened one at a time: there may be more of them than a process may hold open.
            found = (np.array(np.load(stored.path(".npy"), mmap_mode="r")[row]) for stored in self._shards)
            return np.concatenate([np.zeros(0, np.uint64), *found])

        drops = Drops()

        def drop(stage: str, columns: Iterable[np.ndarray]) -> None:
            first_D = first_come(columns, left.left)
            left.left[first_D >= 0] = False
            drops.add_duplicates(stage, first_D)

        if self._config.exact:
            drop("exact", [column(0)])
        if self._config.minhash is not None:
            drop("minhash", map(column, range(1, 1 + self._config.minhash.buckets)))
        return drops

    def _write(
        self, left: Documents, drops: Drops, scored: scoring.Scored, diversified: diversify.Diversified | None
    ) -> dict[str, list[int]]:
        """Write what stays, count what does not, and return documents and bytes that stay by source."""
        kept = {name: [0, 0] for name in self._config.names}
        for stored, first in zip(left.shards, left.starts.tolist(), strict=False):
            name, names = stored.source, stored.meta()["names"]
            with opened_atomically(self._folder / name / f"{stored.number:05d}.jsonl") as out:
                for number, row in enumerate(stored.rows(), first):
                    size = int(left.sizes[number])
                    scored.look(name, number, row)
                    if diversified is not None:
                        diversified.look(number, row)
                    drop = drops.get(number)
                    if drop is None:
                        out.write(scored.marked(name, number, row))
                        kept[name][0] += 1
                        kept[name][1] += size
                        continue

                    def details(row: bytes = row, drop: Drop = drop) -> dict[str, Any]:
                        found = {"text": json.loads(row)["text"][:SAMPLE_CHARS], **drop.details}
                        return found if drop.other is None else {**found, "duplicate_of": left.name(drop.other)}

                    self._tallies[name].dropped(drop.stage, drop.reason, names[number - first], size, details)
        return kept

    def _content(self, kept: dict[str, list[int]], scored: scoring.Scored) -> dict[str, Any]:
        """The report."""
        sources = {}
        for name in self._config.names:
            tally = self._tallies[name]
            after = ("score", "select") if self._config.scores else ()
            after += ("diversity",) if self._config.diversity else ()
            stages = ("read", *self._config.sources[name].filters, "decontaminate", "exact", "minhash", *after, "failed")
            sources[name] = {
                "source": documents.describe(self._config.sources[name].source),
                "read": {"documents": tally.documents, "bytes": tally.bytes},
                "kept": {"documents": kept[name][0], "bytes": kept[name][1]},
                "lengths": tally.length_histogram(),
                "dropped": tally.summary(stages),
            }
            if found := scored.report(name):
                sources[name]["scores"] = found
        report: dict[str, Any] = {"format": FORMAT, "sources": sources}
        if self._forbidden is not None:
            report["evaluation"] = {
                "texts": self._forbidden.texts,
                "ngrams": len(self._forbidden.keys),
                "texts_too_short": self._forbidden.short,
            }
        if scored.learned:
            report["scores"] = scored.learned
        return report


def _say_nothing(progress: Progress) -> None:
    pass


def _identity(
    config: CurationConfig,
    forbidden: contamination.Forbidden | None,
    scorers: Mapping[str, Scorer | Learner],
    embedder: Embedder | None,
    assembler: Assembler,
    synthesizer: Synthesizer,
) -> dict[str, Any]:
    """What the bytes of the folder depend on."""
    return {
        "format": FORMAT,
        **plain(config),
        **identity(config.synthesize, config.generator),
        "forbidden": forbidden.fingerprint if forbidden else None,
        "scorers": {name: scorer.fingerprint for name, scorer in scorers.items()},
        "embedder": embedder.fingerprint if embedder else None,
        "assembled_with": assembler.fingerprints,
        "generated_with": synthesizer.fingerprint,
    }
