"""What a merge is asked to do: mergekit's YAML, with `seed` and `rotary_source` besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lcx.core.configs import build, choice
from lcx.core.errors import UserError
from lcx.merging.methods.table import METHODS

DTYPES = ("float32", "bfloat16", "float16")
"""What a merged model can be written in."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model: its folder, and parameters of its own."""

    model: str
    parameters: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Some layers of one model: from the first of `layer_range` up to, without, the second."""

    model: str
    layer_range: tuple[int, int]
    parameters: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class SliceConfig:
    """Layers of the result, from as many layers of each source."""

    sources: tuple[SourceConfig, ...]
    parameters: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The newer way to say `tokenizer_source`."""

    source: str


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """A merge, with mergekit's names and meanings.

    The result is written as `out_dtype`, else as `dtype`, else as the base (or the first model) is stored; computed is in float32.
    `tokenizer_source` is `base` or a model. `chat_template` is `auto` (what most models have), a template's text, or
    the path of a .jinja file. lcx's own: `seed` of random masks, and `rotary_source`, the model whose rotary settings the result
    gets where models differ in them.
    """

    merge_method: str
    base_model: str | None = None
    models: tuple[ModelConfig, ...] | None = None
    slices: tuple[SliceConfig, ...] | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    rotary_source: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choice("merge_method", self.merge_method, METHODS)
        for name in ("dtype", "out_dtype"):
            if (value := getattr(self, name)) is not None:
                choice(name, value, DTYPES)
        if (self.models is None) == (self.slices is None):
            raise UserError(f"the merge has {'neither' if self.models is None else 'both'} models and slices; give one of the two")
        if not (self.models if self.slices is None else self.slices):
            raise UserError(f"{'models' if self.slices is None else 'slices'} is empty; list at least one")
        for i, one in enumerate(self.slices or ()):
            if not one.sources:
                raise UserError(f"slices[{i}].sources is empty; list at least one")
            if len(lengths := {source.layer_range[1] - source.layer_range[0] for source in one.sources}) > 1:
                raise UserError(f"slices[{i}]: its sources have {sorted(lengths)} layers; give all of them ranges of one length")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise UserError("tokenizer and tokenizer_source say the same thing; keep only one of them")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")

    @property
    def paths(self) -> list[str]:
        """Every model that is merged or that models are taken relative to, once, the base first."""
        listed = [one.model for one in self.models or ()]
        listed += [source.model for one in self.slices or () for source in one.sources]
        return list(dict.fromkeys([*([self.base_model] if self.base_model else []), *listed]))

    @property
    def out(self) -> str | None:
        """The type of the result's numbers, if it is given."""
        return self.out_dtype or self.dtype

    @property
    def tokenizer_of(self) -> str | None:
        """What the file says of whose tokenizer counts."""
        return self.tokenizer_source if self.tokenizer is None else self.tokenizer.source


def read(path: Path) -> MergeConfig:
    """The merge that a YAML file describes; raises `UserError` for a broken file, an unknown key, a value that is not allowed."""
    if not path.is_file():
        raise UserError(f"--config={path} does not exist or is not a file; name a YAML file such as merge.yml")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"--config={path} is not UTF-8 text ({at}); convert it") from error
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config={path} cannot be read as YAML ({_problem(error, text)}); fix the file") from error
    if not isinstance(values, Mapping):
        raise UserError(f"--config={path} is not a mapping of merge_method, models and so on; see docs/merging.md")
    try:
        return build(MergeConfig, {str(key): value for key, value in values.items()}, "the merge")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _problem(error: Exception, text: str) -> str:
    """Line, column and what is wrong there, without what the parser adds to it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        place = error.problem_mark
        return f"line {place.line + 1}, column {place.column + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError) and isinstance(error.character, int):
        before = text[: error.position]
        column = len(before) - before.rfind("\n")
        return f"line {1 + before.count(chr(10))}, column {column}: the character U+{error.character:04X} is not allowed"
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """Makes nothing but plain values, and refuses a key that is there twice."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; raises `YAMLError` for a text that is not of the type that it is said to be of, such as a date."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"{node.value!r} is not a valid {kind}", problem_mark=node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node."""
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for i, key in enumerate(keys):
            if isinstance(key, Hashable) and key in keys[:i]:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is there twice", problem_mark=nodes[i].start_mark)
        return super().construct_mapping(node, deep)
