"""The last choice among documents: by how they lie to each other and to a reference.

Legend: D documents, E embedding dimensions.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from lcx.core.configs import choice, not_negative, positive
from lcx.core.errors import UserError
from lcx.core.files import opened_atomically, write_atomically
from lcx.data.config import SourceConfig
from lcx.data.curation import diversity
from lcx.data.curation.answers import key_of
from lcx.data.curation.embed import EmbedConfig, Embedder, fitted
from lcx.data.curation.select import at_top
from lcx.data.curation.store import Documents, Drop
from lcx.data.curation.tally import SAMPLE_CHARS
from lcx.data.sources import documents as readers

MAP = "diversity.npz"
"""The 2-D map: xy float32 [D, 2], cluster int32 [D], kept bool [D], source int32 [D] and their names (JSON in bytes)."""
CLUSTER_SAMPLES = 3
REFERENCE_CHARS = 100_000
"""Characters of a document of the reference that are read."""


def _check_share(path: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{path}={value!r} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class ReferenceSettings:
    """Keep the `share` of documents that is nearest to any of `documents` of a reference corpus, drawn by a hash of their text."""

    source: SourceConfig = SourceConfig()
    share: float = 0.5
    documents: int = 1000

    def __post_init__(self) -> None:
        _check_share("diversity.reference.share", self.share)
        positive("diversity.reference", documents=self.documents)


@dataclasses.dataclass(frozen=True)
class SemDeDupSettings:
    """Drop documents whose cosine with another of their cluster is above 1 − `epsilon` (arXiv:2303.09540).

    `keep`: of those alike the one farthest from the center (`hard`), the nearest (`easy`), or any (`random`).
    """

    epsilon: float = 0.05
    keep: Literal["hard", "easy", "random"] = "hard"

    def __post_init__(self) -> None:
        positive("diversity.semdedup", epsilon=self.epsilon)
        choice("diversity.semdedup.keep", self.keep, ("hard", "easy", "random"))


@dataclasses.dataclass(frozen=True)
class BalanceSettings:
    """Keep a `share` of the documents, of each cluster in proportion to its size to the power of `tau` (0: of each alike)."""

    share: float = 0.5
    tau: float = 0.5

    def __post_init__(self) -> None:
        _check_share("diversity.balance.share", self.share)
        not_negative("diversity.balance", tau=self.tau)


@dataclasses.dataclass(frozen=True)
class KCenterSettings:
    """Keep a `share` of the documents, each as far as can be from those chosen before it (arXiv:1708.00489).

    Takes as many passes over the vectors as documents stay: right for tens of thousands, or behind another step.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _check_share("diversity.k_center.share", self.share)


@dataclasses.dataclass(frozen=True)
class DiversityConfig:
    """Which of the documents stay for the sake of variety; steps in this order, None for those that are left out.

    `sources`: whose documents are compared, all together (empty: all). `clusters` of k-means (None: the root of the number of
    documents, at most 1,000). `vendi_order`: q of the Vendi score, which the report has of the documents in clusters, of those that
    stay, and of as many drawn at random.
    """

    embedding: EmbedConfig = EmbedConfig()
    sources: tuple[str, ...] = ()
    clusters: int | None = None
    reference: ReferenceSettings | None = None
    semdedup: SemDeDupSettings | None = None
    balance: BalanceSettings | None = None
    k_center: KCenterSettings | None = None
    vendi_order: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive("diversity", clusters=self.clusters)
        not_negative("diversity", vendi_order=self.vendi_order)


def check_diversity(config: DiversityConfig | None, sources: tuple[str, ...]) -> None:
    """Raises `UserError` for a source that is not there."""
    for source in config.sources if config else ():
        choice("config.diversity.sources", source, sources)


class Diversified:
    """What was found: `drops` by number of the document, and what the report says."""

    def __init__(self, drops: Mapping[int, Drop], content: dict[str, Any], shown: Mapping[int, int]) -> None:
        self.drops, self._content, self._shown = drops, content, shown

    def look(self, number: int, row: bytes) -> None:
        """Keep the start of a document's text if the report shows it."""
        if number in self._shown:
            read = json.loads(row)
            sample = {"name": read["name"], "source": read["source"], "text": read["text"][:SAMPLE_CHARS]}
            self._content["clusters"][self._shown[number]]["samples"].append(sample)

    def report(self) -> dict[str, Any]:
        """The numbers, with documents of each cluster to read."""
        return self._content


def run(
    config: DiversityConfig,
    embedder: Embedder,
    documents: Documents,
    folder: pathlib.Path,
    report: Callable[[str, str, int, int, int], None],
) -> Diversified:
    """Compare the documents that are left, and say which go. Writes the map to the folder."""
    shards = [i for i, stored in enumerate(documents.shards) if not config.sources or stored.source in config.sources]
    work = documents.shards[0].folder.parent if shards else folder
    embedder = fitted(embedder, (text for shard in shards for _, text in documents.texts(shard)))
    numbers, x_DE, drops = _vectors(embedder, documents, shards, work, report)
    found = _Choice(config, numbers, x_DE, drops)
    if config.reference is not None:
        found.near(_reference(config.reference, embedder, work / "reference.npy"))
    found.cluster()
    before = diversity.vendi(found.x(), config.vendi_order)
    found.choose()
    content = {
        "embedding": embedder.kind,
        "documents": len(numbers),
        "kept": int(found.left_D.sum()),
        "vendi_order": config.vendi_order,
        "vendi_before": round(before, 4),
        "vendi_after": round(diversity.vendi(found.x(), config.vendi_order), 4),
        "vendi_random": round(diversity.vendi(found.random(), config.vendi_order), 4),
        **found.figures,
    }
    sources = sorted({stored.source for stored in documents.shards})
    source_D = np.array([sources.index(documents.source(number)) for number in numbers.tolist()], np.int32)
    shown = _clusters(found, source_D, sources, content)
    xy_D2, shares = diversity.plane(x_DE) if len(x_DE) else (np.zeros((0, 2), np.float32), np.zeros(2))
    content["map"] = {"method": "PCA", "variance": [round(float(share), 6) for share in shares]}
    with opened_atomically(folder / MAP) as file:
        names = np.frombuffer(json.dumps(sources).encode(), np.uint8)
        np.savez(file, xy=xy_D2, cluster=found.cluster_D, kept=found.left_D, source=source_D, names=names)
    return Diversified(found.drops, content, shown)


class _Choice:
    """Documents and which of them are left; each step works on those that the one before has left."""

    def __init__(self, config: DiversityConfig, numbers: np.ndarray, x_DE: np.ndarray, drops: dict[int, Drop]) -> None:
        self._config, self._numbers, self._x_DE, self.drops = config, numbers, x_DE, drops
        self.left_D = np.ones(len(numbers), bool)
        self.cluster_D = np.full(len(numbers), -1, np.int32)
        self.cosine_D = np.full(len(numbers), -1, np.float32)
        self.figures: dict[str, Any] = {}
        self.centers_KE = np.zeros((0, x_DE.shape[1]), np.float32)

    def number(self, place: int) -> int:
        """The number of a document."""
        return int(self._numbers[place])

    def x(self) -> diversity.Rows:
        """Vectors of those left."""
        return diversity.Rows(self._x_DE, np.flatnonzero(self.left_D))

    def random(self) -> diversity.Rows:
        """Vectors of as many as are left, drawn from those in clusters: what the Vendi score would be without a choice."""
        rng = np.random.Generator(np.random.PCG64(self._config.seed))
        places = rng.permutation(np.flatnonzero(self.cluster_D >= 0))[: int(self.left_D.sum())]
        return diversity.Rows(self._x_DE, np.sort(places))

    def near(self, reference_RE: np.ndarray) -> None:
        """Only those nearest to the reference."""
        assert self._config.reference is not None
        distance_D = diversity.distance_to(self._x_DE, reference_RE)
        keep_D = at_top(-distance_D, np.ones(len(distance_D), np.int64), self._config.reference.share)
        for place in np.flatnonzero(~keep_D).tolist():
            self._drop(place, "far_from_reference", {"distance": round(float(distance_D[place]), 6)})
        deciles = np.quantile(distance_D, np.linspace(0, 1, 11)) if len(distance_D) else []
        self.figures["reference"] = {
            "documents": len(reference_RE),
            "distance_deciles": [round(float(value), 6) for value in deciles],
            "largest_kept": round(float(distance_D[keep_D].max()), 6) if keep_D.any() else None,
        }

    def cluster(self) -> None:
        """Put those left in clusters."""
        left = np.flatnonzero(self.left_D)
        if len(left):
            count = self._config.clusters or min(1000, round(math.sqrt(len(left))))
            self.centers_KE, self.cluster_D[left], self.cosine_D[left] = diversity.k_means(self.x(), count, self._config.seed)

    def choose(self) -> None:
        """The steps that need clusters or compare documents."""
        config = self._config
        if config.semdedup is not None:
            left, of = np.flatnonzero(self.left_D), config.semdedup
            labels = self.cluster_D[left]
            found = diversity.semantic_duplicates(self.x(), labels, self.centers_KE, of.epsilon, of.keep, config.seed)
            for place, other in sorted(found.items()):
                self._drop(int(left[place]), "semantic_duplicate", {}, int(self._numbers[left[other]]))
        if config.balance is not None:
            left, of = np.flatnonzero(self.left_D), config.balance
            stays = diversity.cluster_balanced(self.cluster_D[left], _count(of.share, len(left)), of.tau, config.seed)
            for place in left[~stays].tolist():
                self._drop(place, "cluster_full", {"cluster": int(self.cluster_D[place])})
        if config.k_center is not None:
            left = np.flatnonzero(self.left_D)
            stays = np.zeros(len(left), bool)
            stays[diversity.k_center(self.x(), _count(config.k_center.share, len(left)))] = True
            for place in left[~stays].tolist():
                self._drop(place, "near_a_center", {"cluster": int(self.cluster_D[place])})

    def _drop(self, place: int, reason: str, details: dict[str, Any], other: int | None = None) -> None:
        self.left_D[place] = False
        self.drops[int(self._numbers[place])] = Drop("diversity", reason, other, details)


def _count(share: float, total: int) -> int:
    return max(1, round(share * total)) if total else 0


def _clusters(found: _Choice, source_D: np.ndarray, sources: list[str], content: dict[str, Any]) -> dict[int, int]:
    """Add what the report says of each cluster, and return which documents it shows: number -> cluster."""
    shown: dict[int, int] = {}
    content["clusters"] = []
    for cluster in range(len(found.centers_KE)):
        members = np.flatnonzero(found.cluster_D == cluster)
        by_source = collections.Counter(sources[source] for source in source_D[members].tolist())
        row = {"documents": len(members), "kept": int(found.left_D[members].sum()), "sources": dict(sorted(by_source.items()))}
        content["clusters"].append({**row, "samples": []})
        middle = members[np.argsort(-found.cosine_D[members], kind="stable")][:CLUSTER_SAMPLES]
        shown |= {found.number(place): cluster for place in middle.tolist()}
    return shown


def _vectors(
    embedder: Embedder,
    documents: Documents,
    shards: list[int],
    work: pathlib.Path,
    report: Callable[[str, str, int, int, int], None],
) -> tuple[np.ndarray, np.ndarray, dict[int, Drop]]:
    """Numbers int64 `[D]` and vectors float32 `[D, E]` (mapped from a file) of what can be embedded, and drops of the rest."""
    drops: dict[int, Drop] = {}
    numbers, done, fresh = [np.zeros(0, np.int64)], 0, 0
    for count, shard in enumerate(shards, 1):
        stored, here = documents.shards[shard], documents.in_shard(shard)
        size = int(documents.sizes[here].sum())
        if not stored.path(".vectors.json").exists():
            rows, errors = _embedded(embedder, list(documents.texts(shard)))
            with opened_atomically(stored.path(".vectors.npy")) as file:
                np.save(file, rows)
            write_atomically(stored.path(".vectors.json"), json.dumps({str(place): error for place, error in errors.items()}))
            fresh += size
        errors = json.loads(stored.path(".vectors.json").read_bytes())
        drops |= {int(here[int(place)]): Drop("diversity", reason, None, details) for place, (reason, details) in errors.items()}
        numbers.append(here[[place for place in range(len(here)) if str(place) not in errors]].astype(np.int64))
        done += size
        report(stored.source, "embedded", count, done, fresh)
    parts = [documents.shards[shard].path(".vectors.npy") for shard in shards]
    widths = {shape[1] for part in parts if (shape := np.load(part, mmap_mode="r").shape)[0]}
    total = np.concatenate(numbers)
    if not len(total):
        return total, np.zeros((0, 1), np.float32), drops
    whole = np.lib.format.open_memmap(work / "vectors.npy", "w+", np.float32, (len(total), widths.pop()))
    at = 0
    for part in parts:
        rows = np.load(part)
        whole[at : at + len(rows)] = rows if len(rows) else whole[:0]
        at += len(rows)
    return total, whole, drops


def _embedded(embedder: Embedder, named: list[tuple[str, str]]) -> tuple[np.ndarray, dict[int, tuple[str, dict[str, Any]]]]:
    """Vectors float32 of what can be embedded, and of the others by place the reason and more for the report."""
    errors: dict[int, tuple[str, dict[str, Any]]] = {}
    try:
        rows = list(embedder([text for _, text in named], [name for name, _ in named])) if named else []
    except Exception:
        rows = []
        for place, (name, text) in enumerate(named):
            try:
                rows.append(embedder([text], [name])[0])
            except Exception as error:
                rows.append(np.full(1, np.nan))
                errors[place] = f"embedding_{type(error).__name__}", {"error": f"{type(error).__name__}: {error}"[:SAMPLE_CHARS]}
    for place, row in enumerate(rows):
        if place not in errors and np.isnan(row).any():
            errors[place] = "no_vector", {}
    good = [row for place, row in enumerate(rows) if place not in errors]
    return np.array(good, np.float32) if good else np.zeros((0, 1), np.float32), errors


def _reference(config: ReferenceSettings, embedder: Embedder, path: pathlib.Path) -> np.ndarray:
    """Vectors float32 of the reference; raises `UserError` where it has no text, or its texts cannot be embedded."""
    if not path.exists():
        heap: list[tuple[int, str]] = []
        for _, text in readers.read(config.source, lambda name, reason, sentence: None):
            part = text[: 4 * REFERENCE_CHARS].decode(errors="ignore")[:REFERENCE_CHARS]
            entry = (-int(key_of(part), 16), part)
            heapq.heappush(heap, entry) if len(heap) < config.documents else heapq.heappushpop(heap, entry)
        if not heap:
            raise UserError(
                f"diversity.reference.source {readers.describe(config.source)} has no text; give files that are not empty"
            )
        with opened_atomically(path) as file:
            np.save(file, embedder([text for _, text in sorted(heap, reverse=True)]))
    return np.load(path)
