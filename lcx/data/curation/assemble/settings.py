"""Settings of assembly: which curated documents become longer ones, how, and how long."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.data.curation.embed import EmbedConfig
from lcx.data.curation.settings import check_method

Method = Literal["concatenate", "nearest", "nextlong", "quest", "repository"]
METHODS: tuple[Method, ...] = ("concatenate", "nearest", "nextlong", "quest", "repository")


def _cosine(path: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{path}={value!r} must be a cosine above 0 and at most 1; two texts above it are near-duplicates")


@dataclasses.dataclass(frozen=True)
class NearestSettings:
    """`neighbours` of each document in the graph; two documents with a cosine above `max_similarity` never stand side by side."""

    neighbours: int = 10
    max_similarity: float = 0.95

    def __post_init__(self) -> None:
        positive("nearest", neighbours=self.neighbours)
        _cosine("nearest.max_similarity", self.max_similarity)


@dataclasses.dataclass(frozen=True)
class NextLongSettings:
    """Chunks of at most `chunk_chars` characters, each followed by `min_negatives` to `max_negatives` of its nearest ones.

    As many negatives are taken as bring the document to the target. `anchor_share`: share of the documents that are written in
    order; the others give negatives. `reuse`: a chunk may be a negative in several documents, as in the paper. A chunk with a
    cosine above `max_similarity` to the one that it would follow is no negative, as it says the same.
    """

    chunk_chars: int = 2048
    min_negatives: int = 1
    max_negatives: int = 32
    anchor_share: float = 0.5
    reuse: bool = False
    max_similarity: float = 0.95

    def __post_init__(self) -> None:
        positive("nextlong", chunk_chars=self.chunk_chars, min_negatives=self.min_negatives)
        _cosine("nextlong.max_similarity", self.max_similarity)
        if self.max_negatives < self.min_negatives:
            raise UserError(
                f"nextlong.max_negatives={self.max_negatives} is below nextlong.min_negatives={self.min_negatives}; raise it"
            )
        if not 0 < self.anchor_share < 1:
            raise UserError(
                f"nextlong.anchor_share={self.anchor_share!r} must be between 0 and 1, so that both kinds have documents"
            )

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest number of negatives."""
        return self.min_negatives, self.max_negatives


@dataclasses.dataclass(frozen=True)
class QuestSettings:
    """Each document may be put together with others by one of its `candidates` best words.

    A word is no keyword if it is prominent in fewer than `min_documents`, or in more than the share `max_share` of them.
    """

    candidates: int = 10
    min_documents: int = 2
    max_share: float = 0.2

    def __post_init__(self) -> None:
        positive("quest", candidates=self.candidates, min_documents=self.min_documents)
        if not 0 < self.max_share <= 1:
            raise UserError(f"quest.max_share={self.max_share!r} must be a share above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class RepositorySettings:
    """`root`: the folder that holds the repositories (empty: the deepest one that all names share)."""

    root: str = ""


@dataclasses.dataclass(frozen=True)
class AssembleConfig:
    """A new source made of curated ones.

    `method`: `concatenate` (documents of one source in random order), `nearest` (a path from neighbour to neighbour,
    arXiv:2310.10638), `nextlong` (chunks with hard negatives between them, arXiv:2501.12766), `quest` (documents that share a
    keyword, arXiv:2405.19846), `repository` (files behind those that they import). `sources`: the curated sources (empty: all).
    A document ends with the part that brings it to `target` `unit`s, `bytes` or `tokens` of `tokenizer`, which are counted part by
    part. What is left when parts run out is shorter, and dropped unless `keep_short`. Parts are separated by `separator`.
    `embedding`: the vectors by which `nearest` and `nextlong` compare texts. The settings of a method are under its name; those of
    another one are refused, as they would have no effect.
    """

    method: Method = "concatenate"
    sources: tuple[str, ...] = ()
    target: int = 131072
    unit: Literal["bytes", "tokens"] = "bytes"
    tokenizer: str | None = None
    separator: str = "\n\n"
    keep_short: bool = False
    seed: int = 0
    embedding: EmbedConfig = EmbedConfig()
    nearest: NearestSettings = NearestSettings()
    nextlong: NextLongSettings = NextLongSettings()
    quest: QuestSettings = QuestSettings()
    repository: RepositorySettings = RepositorySettings()

    def __post_init__(self) -> None:
        check_method("assemble", self, METHODS)
        positive("assemble", target=self.target)
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise UserError(
                "assemble.unit='tokens' needs assemble.tokenizer to count with; name one, such as 'bytes'"
                if self.tokenizer is None
                else f"assemble.tokenizer={self.tokenizer!r} has no effect with unit='bytes'; set unit='tokens' or leave it out"
            )
        if self.keep_short and self.method == "nextlong":
            raise UserError(
                "assemble.keep_short=True has no effect with method='nextlong', which writes full documents; leave it out"
            )
        if self.embedding != EmbedConfig() and not self.embeds:
            raise UserError(
                f"assemble.embedding has no effect with method={self.method!r}; leave it out, or use 'nearest' or 'nextlong'"
            )
        if self.method == "nextlong" and (self.embedding.kind == "vectors" or self.embedding.path.endswith((".npy", ".npz"))):
            raise UserError(
                f"assemble.embedding.path={self.embedding.path!r} has vectors of documents, but method='nextlong' compares chunks; "
                "use another kind of embedding"
            )

    @property
    def embeds(self) -> bool:
        """Whether the method compares vectors of texts."""
        return self.method in ("nearest", "nextlong")
