"""What a curation is made of: the dataclasses that `lcx.core.configs.build` fills, and presets of filters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from lcx.core import configs
from lcx.core.configs import choice, positive
from lcx.core.errors import UserError
from lcx.data.config import SourceConfig
from lcx.data.curation.assemble.settings import AssembleConfig
from lcx.data.curation.diversify import DiversityConfig, check_diversity
from lcx.data.curation.filters import FILTERS
from lcx.data.curation.scores import ScoreConfig, check_scores
from lcx.data.curation.select import KeepRule, check_keep
from lcx.data.curation.settings import FilterSettings, GopherRepetitionSettings, MinHashSettings
from lcx.data.curation.synthesize.settings import GeneratorConfig, SynthesizeConfig

KINDS = ("stdlib", "text", "jsonl", "parquet", "tfds")
"""Kinds of sources that hold text; chats and prepared datasets are not curated."""


@dataclasses.dataclass(frozen=True)
class CuratedSource(FilterSettings):
    """A source and its filters: `source` says where documents come from, the other fields what has to be true of them.

    `keep`: by name of a score (`CurationConfig.scores`), which values a document must have to stay.
    """

    source: SourceConfig = SourceConfig()
    keep: dict[str, KeepRule] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        choice("source.kind", self.source.kind, KINDS)
        for name in self.filters:
            choice("filters", name, FILTERS)

    @property
    def settings(self) -> FilterSettings:
        """The filters alone."""
        return FilterSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(FilterSettings)})


@dataclasses.dataclass(frozen=True)
class DecontaminateConfig:
    """Drop documents that share text with evaluation files.

    `path`: one or several glob patterns of JSON, JSONL or text files (empty: none). A document is dropped when it holds a sequence
    of `ngram` words of theirs in at least `min_matches` places.
    """

    path: str | tuple[str, ...] = ()
    ngram: int = 13
    min_matches: int = 1

    def __post_init__(self) -> None:
        positive("decontaminate", ngram=self.ngram, min_matches=self.min_matches)

    @property
    def paths(self) -> tuple[str, ...]:
        """The patterns of `path` as a tuple."""
        return ((self.path,) if self.path else ()) if isinstance(self.path, str) else self.path


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """The whole curation: sources by name, then what all of their documents have in common.

    Stages run in this order: the filters of each source, `decontaminate`, `exact` (one of several documents that differ at most in
    white space and case stays), `minhash` (None: no near-duplicates are looked for), `scores` and what sources `keep` by them,
    `diversity` (None: documents are not compared). Filters come first, so that a document which is dropped anyway never displaces
    another. Of duplicates the first stays: sources in `order` (empty: by name), documents of a source as they are read. A shard of
    the output holds what is left of at least `shard_bytes` of text. `samples`: dropped documents to show for each stage in the
    report. `assemble`: sources to make of the curated ones. `synthesize`: sources that a model, the `generator`, makes of both.
    """

    sources: dict[str, CuratedSource] = dataclasses.field(default_factory=dict)
    order: tuple[str, ...] = ()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    exact: bool = True
    minhash: MinHashSettings | None = MinHashSettings()
    scores: dict[str, ScoreConfig] = dataclasses.field(default_factory=dict)
    diversity: DiversityConfig | None = None
    shard_bytes: int = 1 << 22
    samples: int = 20
    assemble: dict[str, AssembleConfig] = dataclasses.field(default_factory=dict)
    synthesize: dict[str, SynthesizeConfig] = dataclasses.field(default_factory=dict)
    generator: GeneratorConfig | None = None

    def __post_init__(self) -> None:
        positive("config", shard_bytes=self.shard_bytes)
        if not self.sources:
            raise UserError("config.sources is empty; name at least one source, as in configs/data/long_mixture.py")
        kinds = {"sources": self.sources, "assemble": self.assemble, "synthesize": self.synthesize}
        for where, name in ((where, name) for where, named in kinds.items() for name in named):
            if not re.fullmatch(r"\w[\w.-]*", name) or name == "work":
                raise UserError(
                    f"config.{where} has the name {name!r}, which becomes a folder; use letters, digits, '_' and '-', not 'work'"
                )
        for name in self.order:
            choice("config.order", name, self.sources)
        if self.order and sorted(self.order) != sorted(self.sources):
            missing = sorted(set(self.sources) - set(self.order))
            raise UserError(f"config.order={self.order} must name each source once ({', '.join(missing) or 'one is named twice'})")
        check_scores(self.scores, tuple(self.sources))
        check_diversity(self.diversity, tuple(self.sources))
        for name, source in self.sources.items():
            check_keep(source.keep, name, self.scores)
        if self.samples < 0:
            raise UserError(f"config.samples={self.samples} must not be negative")
        for name, assembly in self.assemble.items():
            self._check_assembly(name, assembly)
        for name, synthesis in self.synthesize.items():
            self._check_synthesis(name, synthesis)
        if self.generator is not None and not any(one.asks for one in self.synthesize.values()):
            raise UserError("config.generator has no effect, as no source of config.synthesize asks a model; leave it out")

    def _check_assembly(self, name: str, config: AssembleConfig) -> None:
        if name in self.sources:
            raise UserError(f"config.assemble has the name {name!r}, which is a source already; use another name")
        for source in config.sources:
            choice(f"config.assemble.{name}.sources", source, self.sources)
        for source in config.sources or self.sources:
            if config.method == "repository" and (kind := self.sources[source].source.kind) != "text":
                raise UserError(
                    f"config.assemble.{name} puts files of repositories in order, but source {source!r} is of kind {kind!r}, whose "
                    "documents have no paths; use a source of kind 'text'"
                )

    def _check_synthesis(self, name: str, config: SynthesizeConfig) -> None:
        if name in self.sources or name in self.assemble:
            raise UserError(f"config.synthesize has the name {name!r}, which is a source already; use another name")
        for source in config.sources:
            choice(f"config.synthesize.{name}.sources", source, (*self.sources, *self.assemble))
        if config.asks and self.generator is None:
            raise UserError(
                f"config.synthesize.{name} asks a model, but config.generator names none; set its endpoint or local, or use "
                "method='task'"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The sources in the order in which duplicates stay."""
        return self.order or tuple(sorted(self.sources))

    def scores_of(self, source: str) -> tuple[str, ...]:
        """The names of the scores that documents of a source get, sorted."""
        return tuple(sorted(name for name, one in self.scores.items() if not one.sources or source in one.sources))


PRESETS: dict[str, dict[str, Any]] = {
    "web": {},
    "long": {
        "filters": ("length", "gopher_quality", "gopher_repetition"),
        "gopher_quality": {"max_words": None, "max_symbol_ratio": None, "min_alphabetic_words": None, "min_stop_words": None},
        "gopher_repetition": {
            "max_duplicate_lines": None,
            "max_duplicate_line_chars": None,
            "max_duplicate_paragraphs": None,
            "max_duplicate_paragraph_chars": None,
            "max_duplicate_ngram": tuple(2 * share for share in GopherRepetitionSettings().max_duplicate_ngram or ()),
        },
    },
}
"""Name -> what differs from the published filters.

`web` is the filters as published. `long` leaves out what drops books and code: the limit of 100,000 words, `#` and `...` per word,
the share of words with letters, English stop words, repeated lines and paragraphs, and all of FineWeb and C4, which are about web
pages; sequences of 5 to 10 words may repeat in twice the published share, as they do in a tenth of Python's standard library.
"""


def curated(preset: str = "web", **values: Any) -> ml_collections.ConfigDict:
    """A source with the filters of a preset (`web`, `long`) and every field of `CuratedSource`, so that flags reach all of them.

    `values` override the preset's: `source={"kind": "text", "path": "books/*.txt"}`, `gopher_quality={"min_words": 100}`. Raises
    `UserError` for anything unknown.
    """
    merged = _merged(PRESETS[choice("preset", preset, PRESETS)], values)
    return configs.to_config_dict(configs.build(CuratedSource, merged, "sources.NAME"))


def defaults(values: Mapping[str, Any] | None = None, /, **sources: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Every field of a curation of these sources with its default, as a `ConfigDict`.

    `values` are other fields of `CurationConfig`: `{"scores": {"digits": {"kind": "digits"}}}`. Raises `UserError` for anything
    unknown.
    """
    built = {name: configs.build(CuratedSource, one, f"sources.{name}") for name, one in sources.items()}
    return configs.to_config_dict(configs.build(CurationConfig, {**(values or {}), "sources": built}))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if both else value
    return merged
