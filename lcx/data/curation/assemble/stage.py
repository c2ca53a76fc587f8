"""Assembly as a stage of a curation: from curated sources to new ones in the same layout.

Layout: `NAME/00000.jsonl`, … with rows as those of curated documents, and under `parts` what each is made of: `name` and `source`
of the part, its `start` and `end` in the text and `from`, where it begins in its own document, all in bytes of UTF-8. The plan is
made once and kept in `work/.assemble/plans`; a shard that is there is not written again.

Legend: D curated documents, N assembled documents, S spans.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lcx.core.files import write_atomically
from lcx.data.curation.assemble import plan as plans
from lcx.data.curation.assemble.library import Job, Library, texts
from lcx.data.curation.assemble.methods import METHODS, Given
from lcx.data.curation.assemble.plan import Plan
from lcx.data.curation.assemble.settings import AssembleConfig
from lcx.data.curation.embed import EmbedderFactory, build_embedder
from lcx.data.curation.rows import row
from lcx.data.curation.workers import ordered
from lcx.data.tokenizers import tokenizers

QUANTILES = {"min": 0.0, "median": 0.5, "max": 1.0}


class Assembler:
    """The assemblies of a curation, with what makes their vectors; `fingerprints` change with that.

    `factories` has embedders that need a model. Raises `UserError` for an embedding or a tokenizer that cannot be had.
    """

    def __init__(self, configs: Mapping[str, AssembleConfig], factories: Mapping[str, EmbedderFactory]) -> None:
        self._configs = configs
        self._embedders = {name: build_embedder(one.embedding, factories) for name, one in configs.items() if one.embeds}
        self._gaps = {name: _gap(one) for name, one in configs.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        """That of each embedder, by the name of the assembly."""
        return {name: embedder.fingerprint for name, embedder in self._embedders.items()}

    def run(self, sources: tuple[str, ...], folder: pathlib.Path, work: pathlib.Path, workers: int, shard: int) -> dict[str, Any]:
        """Write every assembled source, at least `shard` bytes a file, into `folder`, and return what the report says of each.

        `sources` are the curated ones, for assemblies that name none. Raises `UserError` for a document without a vector.
        """
        found = {}
        for name, config in self._configs.items():
            library = Library(folder, config.sources or sources, work, workers)
            given = Given(library, config, self._gaps[name], self._embedders.get(name))
            path = work / ".assemble" / "plans" / f"{name}.npz"
            if not path.exists():
                METHODS[config.method](given).save(path)
            plan = plans.load(path)
            _write(name, config, library, plan, folder / name, workers, shard)
            found[name] = _summary(given, plan)
        return found


def _gap(config: AssembleConfig) -> int:
    """Length of the separator in the unit of the target."""
    if config.tokenizer is None:
        return len(config.separator.encode())
    return len(tokenizers.load(config.tokenizer).encode(config.separator))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A shard for a worker: `job` reads the spans of all its documents, of which `counts` says how many each has."""

    name: str
    separator: bytes
    first: int
    counts: list[int]
    parts: list[dict[str, Any]]
    job: Job


def _write(name: str, config: AssembleConfig, library: Library, plan: Plan, folder: pathlib.Path, workers: int, shard: int) -> None:
    """The shards that are not there yet."""
    sizes = _sums(plan.end - plan.start, plan).tolist()
    shards, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= shard or i + 1 == len(sizes):
            shards.append((first, i + 1))
            first, total = i + 1, 0
    missing = [i for i in range(len(shards)) if not (folder / f"{i:05d}.jsonl").exists()]

    def tasks() -> Iterator[_Rows]:
        for i in missing:
            begin, stop = shards[i]
            own = slice(plan.splits[begin], plan.splits[stop])
            document, start, end = plan.document[own], plan.start[own], plan.end[own]
            parts = [
                {"name": library.names[number], "source": library.sources[library.source[number]], "from": at}
                for number, at in zip(document.tolist(), start.tolist(), strict=True)
            ]
            counts = np.diff(plan.splits[begin : stop + 1]).tolist()
            yield _Rows(name, config.separator.encode(), begin, counts, parts, library.job("", None, document, start, end))

    for i, rows in zip(missing, ordered(_rows, tasks(), workers if len(missing) > 1 else 1), strict=True):
        write_atomically(folder / f"{i:05d}.jsonl", rows)


def _rows(task: _Rows) -> bytes:
    """The lines of a shard."""
    lines, reading, parts = [], texts(task.job), iter(task.parts)
    for i, count in enumerate(task.counts):
        pieces, found, at = [], [], 0
        for _ in range(count):
            piece, part = next(reading), next(parts)
            at += len(task.separator) if pieces else 0
            found.append({**part, "start": at, "end": at + len(piece)})
            pieces.append(piece)
            at += len(piece)
        lines.append(row(task.name, f"{task.name}:{task.first + i}", task.separator.join(pieces), parts=found))
    return b"".join(lines)


def _summary(given: Given, plan: Plan) -> dict[str, Any]:
    """Documents and bytes in, out and left over, and lengths before and after in the unit of the target."""
    library = given.library
    gaps = np.diff(plan.splits) - 1
    after = _sums(plan.length, plan) + given.gap * gaps
    separators = len(given.config.separator.encode()) * int(gaps.sum())
    spans = np.unique(np.stack([plan.document, plan.start, plan.end]), axis=1)
    used = np.bincount(spans[0], weights=spans[2] - spans[1], minlength=len(library)).astype(np.int64)
    left: dict[str, dict[str, int]] = {}
    for number, reason in sorted(plan.left.items()):
        of = left.setdefault(reason, {"documents": 0, "bytes": 0})
        of["documents"] += 1
        of["bytes"] += int(library.sizes[number])
    partly = (used > 0) & (used < library.sizes)
    if partly.any():
        # Chunks of documents of which others are used.
        left["rest"] = {"documents": int(partly.sum()), "bytes": int((library.sizes - used)[partly].sum())}
    return {
        "method": given.config.method,
        "sources": list(library.sources),
        "unit": given.config.unit,
        "in": {"documents": len(library), "bytes": int(library.sizes.sum())},
        "out": {"documents": len(plan), "bytes": int((plan.end - plan.start).sum()) + separators, "parts": len(plan.document)},
        "left_over": left,
        "lengths": {"before": _lengths(given.lengths(*given.whole)), "after": _lengths(after)},
    }


def _sums(values: np.ndarray, plan: Plan) -> np.ndarray:
    return np.add.reduceat(values, plan.splits[:-1]) if len(plan) else np.zeros(0, np.int64)


def _lengths(lengths: np.ndarray) -> dict[str, float]:
    """Smallest, median, mean and largest length; 0 where there are none."""
    if not len(lengths):
        return dict.fromkeys([*QUANTILES, "mean"], 0)
    found = {name: float(np.quantile(lengths, share)) for name, share in QUANTILES.items()}
    return {**found, "mean": round(float(lengths.mean()), 1)}
