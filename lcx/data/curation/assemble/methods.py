"""The methods of assembly: each makes a plan of the documents of a library.

Legend: D documents, C chunks.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lcx.data.curation.assemble import keywords, neighbours, plan, repository
from lcx.data.curation.assemble.chunks import Chunks, Pool
from lcx.data.curation.assemble.library import Library
from lcx.data.curation.assemble.plan import Builder, Plan, Span
from lcx.data.curation.assemble.settings import AssembleConfig, Method
from lcx.data.curation.embed import Embedder


class Given(NamedTuple):
    """What a method works on; `gap` is the length of the separator in the unit of the target.

    `embedder` is there for methods that compare vectors.
    """

    library: Library
    config: AssembleConfig
    gap: int
    embedder: Embedder | None = None

    @property
    def rng(self) -> np.random.Generator:
        """The assembly's random stream, from its beginning."""
        return np.random.default_rng(self.config.seed)

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The spans of whole documents: document, start, end, int64 `[D]`."""
        return np.arange(len(self.library)), np.zeros(len(self.library), np.int64), self.library.sizes

    def lengths(self, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Lengths int64 of spans in the unit of the target."""
        if self.config.tokenizer is None or not len(document):
            return end - start
        return self.library.tokens(self.config.tokenizer, document, start, end)

    def vectors(self, document: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Normalised vectors float32 of the texts of spans."""
        assert self.embedder is not None
        return self.library.vectors(self.embedder, document, start, end) if len(document) else np.zeros((0, 1), np.float32)

    def joined(self, groups: list[list[int]], reasons: dict[int, str]) -> Plan:
        """The plan that concatenates the documents of each group in their order, and starts anew with each group."""
        builder = Builder(self.config.target, self.gap, self.config.keep_short)
        lengths, sizes = self.lengths(*self.whole).tolist(), self.library.sizes.tolist()
        for group in groups:
            for document in group:
                builder.add(Span(document, 0, sizes[document], lengths[document]))
            builder.end()
        return builder.plan(len(self.library), reasons)


def concatenate(given: Given) -> Plan:
    """Documents of one source in random order."""
    order = given.rng.permutation(len(given.library))
    source = given.library.source[order]
    return given.joined([order[source == i].tolist() for i in range(len(given.library.sources))], {})


def nearest(given: Given) -> Plan:
    """Documents along a path from neighbour to neighbour."""
    settings = given.config.nearest
    path, left = neighbours.path(given.vectors(*given.whole), settings.neighbours, settings.max_similarity)
    return given.joined([path], dict.fromkeys(left, "near_duplicate"))


def quest(given: Given) -> Plan:
    """Documents that share a keyword, in random order."""
    config, count = given.config, len(given.library)
    words = keywords.candidates(given.library.whole("words", None), config.quest)
    builder = Builder(config.target, given.gap, config.keep_short)
    lengths, sizes = given.lengths(*given.whole).tolist(), given.library.sizes.tolist()
    place, used = given.rng.permutation(count), set()

    def use(documents: list[int]) -> list[int]:
        """Fill documents as long as there is enough; what remains may share another keyword."""
        taken, pending = [], []
        for document in sorted(documents, key=place.__getitem__):
            pending.append(document)
            if builder.add(Span(document, 0, sizes[document], lengths[document])):
                taken += pending
                pending = []
        builder.discard()
        used.update(taken)
        return taken

    keywords.by_text(words, lengths, config.target, use)
    rest: dict[str, list[int]] = {}
    for document in np.argsort(place).tolist():
        if words[document] and document not in used:
            rest.setdefault(words[document][0], []).append(document)
    for documents in rest.values():
        for document in documents:
            builder.add(Span(document, 0, sizes[document], lengths[document]))
        builder.end()
    return builder.plan(count, {i: "no_keyword" for i, own in enumerate(words) if not own})


def in_repositories(given: Given) -> Plan:
    """Files of each repository in the order of their dependencies."""
    library, groups = given.library, []
    for source in range(len(library.sources)):
        own = np.flatnonzero(library.source == source)
        placed = [placed_in(library.names[i], root) for root in [root_of(library, own, given)] for i in own]
        found: dict[str, list[int]] = {}
        for i, (name, _) in enumerate(placed):
            found.setdefault(name, []).append(i)
        paths = [path for _, path in placed]
        spans = own, np.zeros(len(own), np.int64), library.sizes[own]
        referred = [one for block in library.run("references", lambda block, paths=paths: paths[block], *spans) for one in block]
        for name in sorted(found):
            files = found[name]
            order = repository.order([paths[i] for i in files], [referred[i] for i in files])
            groups.append([int(own[files[i]]) for i in order])
    return given.joined(groups, {})


def root_of(library: Library, own: np.ndarray, given: Given) -> str:
    """The folder in front of the repositories: the one that is set, or the deepest that all names share."""
    if given.config.repository.root:
        return given.config.repository.root
    folders = [posixpath.dirname(library.names[i]).split("/") for i in own]
    shared = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared)


def placed_in(name: str, root: str) -> tuple[str, str]:
    """The repository of a document and its path there; one that is in no folder below the root is in the repository `.`."""
    root = root.rstrip("/")
    inside = name[len(root) :].lstrip("/") if root and name.startswith(f"{root}/") else name
    first, slash, rest = inside.partition("/")
    return (first, rest) if slash else (".", inside)


def nextlong(given: Given) -> Plan:
    """Chunks of a document in order, each followed by the nearest chunks of other documents."""
    settings, library = given.config.nextlong, given.library
    ends = library.whole("chunks", settings.chunk_chars)
    document = np.repeat(np.arange(len(library)), [len(one) for one in ends])
    end = np.array([end for one in ends for end in one], np.int64)
    start = np.array([start for one in ends for start in [0, *one[:-1]][: len(one)]], np.int64)
    chunks = Chunks(document, given.lengths(document, start, end), given.vectors(document, start, end))
    order = given.rng.permutation(len(library))
    anchors = order[: max(1, round(settings.anchor_share * len(order)))]
    pool = Pool(chunks, ~np.isin(document, anchors), settings.max_similarity, settings.reuse)
    reasons = dict.fromkeys(np.setdiff1d(np.arange(len(library)), anchors).tolist(), "not_chosen")
    firsts, assembled = np.searchsorted(document, np.arange(len(library) + 1)), []
    for anchor in anchors.tolist():
        rest = list(range(firsts[anchor], firsts[anchor + 1]))
        while rest and (found := pool.compose(rest, given.config.target, given.gap, settings.limits)) is not None:
            assembled.append([Span(*map(int, (document[i], start[i], end[i], chunks.length[i]))) for i in found])
            rest = [i for i in rest if i > max(one for one in found if document[one] == anchor)]
        if not pool.has_free:
            reasons[anchor] = "no_negatives_left"
    return plan.of(assembled, len(library), reasons)


METHODS: dict[Method, Callable[[Given], Plan]] = {
    "concatenate": concatenate,
    "nearest": nearest,
    "nextlong": nextlong,
    "quest": quest,
    "repository": in_repositories,
}
"""By name."""
