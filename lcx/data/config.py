"""What a training mixture is made of: the dataclasses that `lcx.core.configs.build` fills.

All values are checked here, so that a wrong one is reported before anything is read or compiled.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from lcx.core.configs import choice, not_negative, positive
from lcx.core.errors import UserError
from lcx.data.synthetic.questions import QuestionsConfig
from lcx.data.tasks.base import TaskConfig
from lcx.data.tasks.table import TASKS


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """Short conversations joined into long ones (`lcx.data.chat.join`).

    `tokens`: as many conversations as have at most so many tokens together, under the chat template, become one (None: each stays
    as it is, and the other settings mean nothing). Those that are not of user and assistant by turns, that have empty turns or
    tools, or fewer than `min_turns` turns or `min_chars` characters of the assistant, are left out, and so are repeated ones.
    `seed` shuffles them.
    """

    tokens: int | None = None
    min_turns: int = 1
    min_chars: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        positive("source.join", tokens=self.tokens, min_turns=self.min_turns)
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            not_negative("source.join", **{field.name: value})
            if self.tokens is None and value != field.default:
                raise UserError(
                    f"source.join.{field.name}={value!r} has no effect without source.join.tokens; set it, or leave this out"
                )


KINDS_WITH = {
    "field": ("jsonl", "parquet", "tfds", "chat"),
    "split": ("tfds",),
    "data_dir": ("tfds",),
    "include_tests": ("stdlib",),
}
"""The kinds of sources that settings mean something to, of settings that mean nothing to others."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where documents come from.

    `kind`: `stdlib` (the running Python's standard library), `text` (one document per file), `jsonl`, `parquet` (one per
    line or row), `tfds` (through `tfds.data_source`), `array_record` (a folder written by `lcx data prepare`), `chat` (JSONL
    files with one conversation per line, `{"messages": [{"role": ..., "content": ...}, ...]}`, optionally with `tools`; a chat
    template turns it into text, and only what the role `assistant` writes has a loss weight).
    `path`: one or several glob patterns; for `tfds` the dataset's name, for `array_record` the folder.
    `field`: the key, column or feature that holds the text (for `chat` the messages, `messages` by default).
    `split`: split of a `tfds` dataset. `data_dir`: where `tfds` looks for it. `include_tests`: also read the test packages of the
    standard library. `append_eos`: end each document with the tokenizer's end-of-sequence token, and each part of a document that
    curation has assembled. `limit_bytes`: stop reading documents once this much text has been read (None: read all); prepared
    data are read whole. `join`: short conversations of a `chat` become long ones.
    """

    kind: Literal["stdlib", "text", "jsonl", "parquet", "tfds", "array_record", "chat"] = "stdlib"
    path: str | tuple[str, ...] = ""
    field: str = "text"
    split: str = "train"
    data_dir: str | None = None
    include_tests: bool = False
    append_eos: bool = False
    limit_bytes: int | None = None
    join: JoinConfig = JoinConfig()

    def __post_init__(self) -> None:
        positive("source", limit_bytes=self.limit_bytes)
        if self.join.tokens is not None and self.kind != "chat":
            raise UserError(
                f"source.join.tokens={self.join.tokens} joins conversations, but source.kind={self.kind!r}; leave it out"
            )
        if self.kind != "stdlib" and not self.paths:
            raise UserError(f"source.path is empty, but source.kind={self.kind!r} needs one; give a path, or use kind='stdlib'")
        if self.kind == "stdlib" and self.paths:
            raise UserError(
                f"source.path={', '.join(self.paths)} is not read with source.kind='stdlib', which is Python's own library; set "
                "source.kind='text', or the kind that the files are of"
            )
        for field in dataclasses.fields(self):
            name, value, kinds = field.name, getattr(self, field.name), KINDS_WITH.get(field.name)
            if kinds is not None and self.kind not in kinds and value != field.default:
                meant = " or ".join(map(repr, kinds))
                raise UserError(f"source.{name}={value} means nothing to source.kind={self.kind!r}, only to {meant}; leave it out")
        if self.kind == "chat" and self.append_eos:
            raise UserError(
                "source.append_eos=True cannot be combined with source.kind='chat', whose template writes the end tokens; remove it"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The patterns of `path` as a tuple."""
        return ((self.path,) if self.path else ()) if isinstance(self.path, str) else self.path


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """How documents are packed into rows; all combinations of the options are allowed.

    `method`: `concat_then_split` (one stream, cut at the end of each row), `first_fit` or `best_fit` (documents stay whole if
    they fit into a row). `mask_documents`: tokens see only their own document. `reset_positions`: positions restart at each
    document. `shared_bos`: each row starts with a begin-of-sequence token that every document sees.
    """

    method: Literal["concat_then_split", "first_fit", "best_fit"] = "concat_then_split"
    mask_documents: bool = False
    reset_positions: bool = False
    shared_bos: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a row is read as one text with one run of positions, so that these may be remapped."""
        return not (self.mask_documents or self.reset_positions or self.shared_bos)


Upsampling = Literal["per_source", "global", "none"]

QUESTIONS = "questions"
"""The kind of a part that holds training questions in words."""


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """One part of a mixture: packed text (or chats, by its source), or rows of a task with the source as haystack.

    `kind`: `text`, `questions` (training questions in words, `lcx.data.synthetic.questions`), or a row of `lcx.data.tasks.table`.
    `weight`: share of the rows, relative to the other parts' weights. `loss_weight` multiplies the part's loss weights.
    Length upsampling, as in arXiv:2402.10171: documents below `short_tokens` are kept with probability `short_keep`, longer ones
    always; `DataConfig.length_upsampling` says what becomes of the part's share. `min_tokens` and `max_tokens` exclude documents
    of other lengths entirely.
    `remap`: positions passed to the model are `none` (as packed), `pose` (PoSE's skips between `pose_chunks` chunks of a row) or
    `randomized`, up to the stage's `max_position`.
    """

    kind: str = "text"
    weight: float = 1.0
    loss_weight: float = 1.0
    source: SourceConfig = SourceConfig()
    packing: PackingConfig = PackingConfig()
    task: TaskConfig = TaskConfig()
    questions: QuestionsConfig = QuestionsConfig()
    short_tokens: int = 4096
    short_keep: float = 1.0
    min_tokens: int = 1
    max_tokens: int | None = None
    remap: Literal["none", "pose", "randomized"] = "none"
    pose_chunks: int = 2

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("text", QUESTIONS, *TASKS))
        not_negative("part", weight=self.weight, loss_weight=self.loss_weight)
        positive("part", short_tokens=self.short_tokens, min_tokens=self.min_tokens, max_tokens=self.max_tokens)
        if not 0 <= self.short_keep <= 1:
            raise UserError(f"part.short_keep={self.short_keep} must be a probability from 0 to 1")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise UserError(f"part.max_tokens={self.max_tokens} is below part.min_tokens={self.min_tokens}; raise it")
        if self.is_task:
            self._refuse_packing()
        if self.pose_chunks < 2:
            raise UserError(f"part.pose_chunks={self.pose_chunks} leaves no skip between chunks; give at least 2")
        if self.pose_chunks != 2 and self.remap != "pose":
            raise UserError(f"part.pose_chunks={self.pose_chunks} has no effect without part.remap='pose'; leave it out")
        if self.remap != "none" and not self.packing.is_plain:
            raise UserError(
                f"part.remap={self.remap!r} rewrites the positions of whole rows; set packing.mask_documents, "
                "packing.reset_positions and packing.shared_bos to False"
            )

    def _refuse_packing(self) -> None:
        """Raises `UserError` for settings of packed documents, which the rows of a task are not made of."""
        given = [("packing.", self.packing, field) for field in dataclasses.fields(PackingConfig)]
        given += [("", self, field) for field in dataclasses.fields(PartConfig) if field.name in ("short_tokens", "short_keep")]
        for place, config, field in given:
            if (value := getattr(config, field.name)) != field.default:
                raise UserError(
                    f"part.{place}{field.name}={value} is for packed documents, but part.kind={self.kind!r} makes rows of its own; "
                    "leave it out"
                )

    @property
    def is_task(self) -> bool:
        """True if the rows are those of a task, not text as it is."""
        return self.kind != "text"

    @property
    def is_retrieval(self) -> bool:
        """True if the rows are those of a retrieval task in tokens."""
        return self.kind in TASKS


def _default_parts() -> dict[str, PartConfig]:
    return {"text": PartConfig(weight=0.3), "needles": PartConfig(kind="multikey", weight=0.7)}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The whole mixture: parts by name.

    `tokenizer`: `bytes`, `bytes+bos`, `bytes+eos`, `bytes+bos+eos`, or the path of a Hugging Face `tokenizer.json`, a
    SentencePiece model, a file of tiktoken ranks, or a folder that contains one of these. `chat_template`: path of a jinja2
    template for sources of kind `chat` (None: the tokenizer's own).
    `length_upsampling`: where short documents are thinned (`short_keep` of a text part), `per_source` keeps each part's share of
    the rows, `global` lets a part's share shrink as its text does (`lcx.data.upsampling`); `none` thins nothing, for comparison.
    `heldout_fraction`: documents whose content hash falls below it are kept out of training.
    """

    tokenizer: str = "bytes"
    chat_template: str | None = None
    parts: dict[str, PartConfig] = dataclasses.field(default_factory=_default_parts)
    length_upsampling: Upsampling = "per_source"
    heldout_fraction: float = 0.05

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("data.parts is empty; define at least one part")
        if not sum(part.weight for part in self.parts.values()) > 0:
            raise UserError(f"all of data.parts ({', '.join(self.parts)}) have weight 0; give at least one a positive weight")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"data.heldout_fraction={self.heldout_fraction} must be at least 0 and below 1")
