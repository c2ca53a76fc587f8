"""Batches as a pure function of (config, seed, stage, step): there is no state, so resuming takes only a step number.

Legend: B batch rows, T tokens in a row, P parts. Row r of step s is element s * B + r of the mixture. A process builds only the
rows that it needs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from lcx.attention.parallel.documents import Documents
from lcx.core.batch import Batch
from lcx.core.errors import UserError
from lcx.data import mixture, packing, remap, upsampling
from lcx.data.chat import chat
from lcx.data.chat.frame import chat_frame
from lcx.data.config import QUESTIONS, DataConfig, PartConfig, SourceConfig, Upsampling
from lcx.data.schedule import Schedule
from lcx.data.sources import sources
from lcx.data.sources.documents import describe
from lcx.data.synthetic.questions import QuestionTask
from lcx.data.tasks.base import RetrievalTask
from lcx.data.tasks.table import make_task
from lcx.data.tokenizers import tokenizers

# Last element of the key of a random stream, so that no two uses share a stream.
_PLAN, _TASK, _KEEP, _REMAP, _SHUFFLE = range(5)
_KEYS = ("tokens", "targets", "loss_weights", "order", "positions", "segments")


class Corpus:
    """The tokenizer and the tokenised sources of a mixture, read once and shared by the loaders of all stages."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tokenizer = tokenizers.load(config.tokenizer)
        wanted = {part.source: None for part in config.parts.values() if part.weight > 0}
        # A mistake in a later one is found before minutes are spent on the first, whose own shows as soon as it is read.
        for source in list(wanted)[1:]:
            sources.check(source, self.tokenizer, config.chat_template)
        self._sources = {source: sources.load(source, self.tokenizer, config.chat_template) for source in wanted}

    def contents(self) -> dict[str, str]:
        """What each source holds, in words: equal for equal documents, so that hosts can be compared."""
        found = {}
        for source, held in self._sources.items():
            digest = zlib.crc32(held.hashes.tobytes() + np.ascontiguousarray(held.lengths).tobytes())
            found[describe(source)] = f"{len(held.lengths):,} documents, {int(held.lengths.sum()):,} tokens ({digest:08x})"
        return found

    def select(self, source: SourceConfig, split: sources.Split) -> sources.Subset:
        """The training or held-out documents of one of the mixture's sources."""
        return sources.split(self._sources[source], self.config.heldout_fraction, split)


class Loader:
    """The rows of one stage's mixture.

    `rows` is B, the number of rows of the whole batch; `seq_len` is T. Remapped positions stay below `max_position` (default
    `seq_len`). `split` is `train` or `heldout`. `schedule` has the weights of parts that change within the stage, which then has
    no rows beyond its steps. Pass `corpus` to avoid reading the sources again. Raises `UserError` if the sources or the tasks do
    not fit.
    """

    def __init__(
        self,
        config: DataConfig,
        seq_len: int,
        rows: int,
        seed: int,
        stage_index: int = 0,
        *,
        max_position: int | None = None,
        corpus: Corpus | None = None,
        split: sources.Split = "train",
        schedule: Schedule | None = None,
    ) -> None:
        if seq_len < 1 or rows < 1:
            raise UserError(f"a batch of {rows} rows of {seq_len} tokens is empty; give at least one row of one token")
        self.config, self.seq_len, self.num_rows, self.seed, self.stage_index = config, seq_len, rows, seed, stage_index
        self.max_position = seq_len if max_position is None else max_position
        if self.max_position < seq_len:
            raise UserError(f"max_position={self.max_position} is below seq_len={seq_len}; set it to at least {seq_len}")
        self.corpus = Corpus(config) if corpus is None else corpus
        # Sorted, with random streams keyed by name, so that a part's rows depend neither on the order of keys nor on other parts.
        self.names = sorted(name for name, part in config.parts.items() if part.weight > 0)
        key = (seed, stage_index, int(split == "heldout"))
        keys = [(*key, zlib.crc32(name.encode())) for name in self.names]
        self.parts = [_make_part(self, name, split, own) for name, own in zip(self.names, keys, strict=True)]
        self.schedule = schedule
        sizes, keys = [part.size for part in self.parts], [(*own, _SHUFFLE) for own in keys]
        constant = [config.parts[name].weight for name in self.names]
        if schedule is None:
            weights = self.weights(config.length_upsampling)
            self.shares = weights / weights.sum()
            self.rows = mixture.addresses(weights.tolist(), sizes, keys)
        else:
            weights = upsampling.weigh(schedule.weights(self.names, constant, rows), self._kept(), config.length_upsampling)
            self.shares = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
            self.rows = mixture.changing(weights, sizes, keys)

    def batch(self, step: int, rows: slice = slice(None), columns: np.ndarray | None = None) -> Batch:
        """Rows `rows` of step `step`, as NumPy arrays `[B, T]` (`row_parts` `[B]`): weights float32, all others int32.

        With `columns` int `[m]`, only those of each row, `[B, m]`; of packed text nothing else is read. With columns `[B, m]` other
        ones of each row.
        """
        part, row = self.addresses(step, rows)
        columns = None if columns is not None and np.array_equal(columns, np.arange(self.seq_len)) else columns
        shape = (len(part), self.seq_len if columns is None else columns.shape[-1])
        out = {key: np.zeros(shape, np.float32 if key == "loss_weights" else np.int32) for key in _KEYS}
        out["order"][:] = np.arange(self.seq_len, dtype=np.int32) if columns is None else columns
        if columns is not None and columns.ndim == 2:
            groups = [([i], index, columns[i]) for i, index in enumerate(part.tolist())]
        else:
            groups = [(np.flatnonzero(part == index), index, columns) for index in np.unique(part)]
        for own, index, wanted in groups:
            for key, value in self.parts[index].build(row[own], wanted).items():
                out[key][own] = value
        return Batch(**out, row_parts=part.astype(np.int32), num_parts=len(self.names))

    def weights(self, how: Upsampling) -> np.ndarray:
        """The weights float64 `[P]` with which parts would be mixed under `how`; averages, where they change within the stage."""
        return upsampling.weigh(np.asarray([self.config.parts[name].weight for name in self.names]), self._kept(), how)

    def repeats(self, steps: int) -> dict[SourceConfig, tuple[float, list[str]]]:
        """How often the documents of each source of packed text are read in `steps` steps, by all its parts, and the parts' names.

        With a schedule, `steps` are those of its stage.
        """
        found: dict[SourceConfig, tuple[float, list[str]]] = {}
        for name, part, share in zip(self.names, self.parts, self.shares.tolist(), strict=True):
            if part.size is not None:
                source = self.config.parts[name].source
                before, names = found.get(source, (0.0, []))
                found[source] = before + share * steps * self.num_rows / part.size, [*names, name]
        return found

    def _kept(self) -> np.ndarray:
        """The fraction of its tokens that thinning leaves to each part of text, NaN for the others."""
        texts = [unmapped(part) for part in self.parts]
        fractions = [part.thinned.num_tokens / part.whole.num_tokens if isinstance(part, TextPart) else np.nan for part in texts]
        return np.asarray(fractions)

    def batches(self, start: int = 0, rows: slice = slice(None)) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from step `start` onwards, endlessly."""
        step = start
        while True:
            yield step, self.batch(step, rows)
            step += 1

    def provenance(self, step: int, rows: slice = slice(None)) -> list[str]:
        """One line for each row of the step: its part and the documents or task that it was made from."""
        part, row = self.addresses(step, rows)
        return [f"{self.names[p]}[{r}]: {self.parts[p].describe(r)}" for p, r in zip(part.tolist(), row.tolist(), strict=True)]

    def documents(self, step: int, rows: slice = slice(None)) -> list[Documents]:
        """The documents of each of the step's rows, as the mask has them; no token is read."""
        part, row = self.addresses(step, rows)
        return [self.parts[p].documents(r) for p, r in zip(part.tolist(), row.tolist(), strict=True)]

    def addresses(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(part, row of the part) of each of the step's rows, int64 `[B]`; parts as numbered in `names`."""
        first, stop, stride = rows.indices(self.num_rows)
        if step < 0 or stride != 1 or stop <= first:
            raise ValueError(f"step {step}, rows {rows} of {self.num_rows}: rows must be a non-empty contiguous slice, step >= 0")
        if self.schedule is not None and step >= self.schedule.steps:
            raise ValueError(f"step {step} is beyond the {self.schedule.steps} steps over which the stage's weights change")
        return mixture.locate(self.rows, step * self.num_rows + first, stop - first)


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Packed rows of text from `source`, which is `whole` or what is left of it when short documents are `thinned`."""

    config: PartConfig
    seq_len: int
    whole: sources.Subset
    thinned: sources.Subset
    source: sources.Subset
    plan: packing.Plan
    bos_id: int | None

    @property
    def size(self) -> int:
        """Rows in an epoch."""
        return len(self.plan)

    def build(self, rows: np.ndarray, columns: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        """Arrays `[n, T]` of the named rows, or `[n, m]` of `columns`."""
        out = packing.assemble(self.plan, rows, self.source, self.seq_len, self.config.packing, self.bos_id, columns)
        out["loss_weights"] *= np.float32(self.config.loss_weight)
        return out

    def documents(self, row: int) -> Documents:
        """The row's documents."""
        return packing.documents(self.plan, row, self.seq_len, self.config.packing)

    def describe(self, row: int) -> str:
        """The row's documents with the tokens taken from each."""
        return ", ".join(f"{self.source.name(d)}[{start}:{end}]" for d, start, end in self.plan.spans(row))


@dataclasses.dataclass(frozen=True)
class TaskPart:
    """Rows of a task, each from its own random stream."""

    config: PartConfig
    seq_len: int
    source: sources.Subset
    task: RetrievalTask | QuestionTask
    key: tuple[int, ...]
    size: None = None

    def build(self, rows: np.ndarray, columns: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        """Arrays `[n, T]` of the named rows, or `[n, m]` of `columns`."""
        samples = self.task.rows(self._uniforms(rows), self.seq_len, self.source)
        out = {
            "tokens": samples.tokens[:, :-1],
            "targets": samples.tokens[:, 1:],
            "loss_weights": samples.loss_weights[:, 1:] * np.float32(self.config.loss_weight),
            "segments": np.ones((len(rows), self.seq_len), np.int32),
            "positions": np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), (len(rows), self.seq_len)),
        }
        return _cut(out, columns)

    def documents(self, row: int) -> Documents:
        """A row is one document."""
        return Documents(np.asarray([self.seq_len]), np.asarray([1]))

    def describe(self, row: int) -> str:
        """The task's name and counts."""
        return f"{self.config.kind} with {self.task.describe(self.seq_len)}"

    def skills(self, rows: np.ndarray) -> tuple[str, ...]:
        """The skill of each of the named rows of questions in words; of another task, its kind."""
        if not isinstance(self.task, QuestionTask):
            return (self.config.kind,) * len(rows)
        return self.task.rows(self._uniforms(rows), self.seq_len, self.source).skills

    def _uniforms(self, rows: np.ndarray) -> np.ndarray:
        count = self.task.uniforms(self.seq_len)
        return np.stack([rng.random(count) for rng in generators(self.key, rows)])


@dataclasses.dataclass(frozen=True)
class Remapped:
    """A part whose positions are skipped or randomized, row by row."""

    part: TextPart | TaskPart
    max_position: int
    key: tuple[int, ...]

    @property
    def size(self) -> int | None:
        """Rows in an epoch, None if endless."""
        return self.part.size

    def build(self, rows: np.ndarray, columns: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
        """Arrays `[n, T]` of the named rows, or `[n, m]` of `columns`; the positions of a row are drawn for all of it."""
        out = dict(self.part.build(rows))
        new = np.empty_like(out["positions"])
        for i, rng in enumerate(generators(self.key, rows)):
            if self.part.config.remap == "pose":
                new[i] = remap.pose(out["positions"][i], rng, self.max_position, self.part.config.pose_chunks)
            else:
                new[i] = remap.randomized(new.shape[1], rng, self.max_position)
        return _cut({**out, "positions": new}, columns)

    def documents(self, row: int) -> Documents:
        """Those of the part: masks do not see positions."""
        return self.part.documents(row)

    def describe(self, row: int) -> str:
        """The part's own description, and the remap."""
        config = self.part.config
        how = f"pose in {config.pose_chunks} chunks" if config.remap == "pose" else config.remap
        return f"{self.part.describe(row)}; positions {how} up to {self.max_position}"


def _cut(out: Mapping[str, np.ndarray], columns: np.ndarray | None) -> Mapping[str, np.ndarray]:
    return out if columns is None else {key: x[:, columns] for key, x in out.items()}


def unmapped(part: TextPart | TaskPart | Remapped) -> TextPart | TaskPart:
    """The part whose positions are remapped, or else the part itself."""
    return part.part if isinstance(part, Remapped) else part


def generators(key: tuple[int, ...], rows: np.ndarray) -> Iterator[np.random.Generator]:
    """The random stream of each row: counter-based generators, which are cheap to create and identical on every machine."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    for row in rows.tolist():
        yield np.random.Generator(np.random.Philox(key=words, counter=[0, 0, 0, row]))


def _make_part(loader: Loader, name: str, split: sources.Split, key: tuple[int, ...]) -> TextPart | TaskPart | Remapped:
    config, tokenizer, seq_len = loader.config.parts[name], loader.corpus.tokenizer, loader.seq_len
    try:
        chosen = loader.corpus.select(config.source, split)
        source = sources.lengths_between(chosen, config.min_tokens, config.max_tokens)
        if config.is_task:
            part = TaskPart(config, seq_len, source, _task(config, loader.corpus), (*key, _TASK))
            part.build(np.arange(1))
            if isinstance(part.task, QuestionTask):
                part.task.check(seq_len, source)
        else:
            thinned = upsampling.thin(source, config.short_tokens, config.short_keep, np.random.default_rng((*key, _KEEP)))
            kept = source if loader.config.length_upsampling == "none" else thinned
            rng = np.random.default_rng((*key, _PLAN))
            plan = packing.plan(config.packing.method, kept.lengths, seq_len - config.packing.shared_bos, rng)
            part = TextPart(config, seq_len, source, thinned, kept, plan, tokenizer.bos_id)
            part.build(np.arange(1))
        if config.remap == "pose" and config.pose_chunks > seq_len:
            raise UserError(f"part.pose_chunks={config.pose_chunks} exceeds a row, which has seq_len={seq_len}; lower it")
    except UserError as error:
        raise UserError(f"data.parts.{name}: {error}") from error
    return part if config.remap == "none" else Remapped(part, loader.max_position, (*key, _REMAP))


def _task(config: PartConfig, corpus: Corpus) -> RetrievalTask | QuestionTask:
    tokenizer, template = corpus.tokenizer, corpus.config.chat_template
    if config.kind != QUESTIONS:
        return make_task(config.kind, config.task, tokenizer)
    wanted = config.questions.prompt_format
    is_chat = wanted == "chat" or (wanted == "auto" and (template is not None or chat.has_template(tokenizer)))
    return QuestionTask(config.questions, tokenizer, chat_frame(chat.load(tokenizer, template)) if is_chat else None)


def probe(config: DataConfig, seq_len: int, rows: int, seed: int, corpus: Corpus | None = None) -> Batch:
    """A fixed batch of `rows` held-out rows `[rows, T]` for monitoring a run.

    The first half is packed text with its usual weights, the rest (`rows // 2`) needles or questions in held-out text with weight
    1 on the answers and 0 elsewhere. Packing and task are those of the mixture's heaviest text part and heaviest task part; without
    such a part, the defaults over the source of the heaviest part. Depends only on its arguments. Raises `UserError` for fewer
    than two rows.
    """
    if rows < 2:
        raise UserError(f"a probe of {rows} rows cannot hold both text and needles; use at least 2")
    used = sorted((part for _, part in sorted(config.parts.items()) if part.weight > 0), key=lambda part: -part.weight)
    text = next((part for part in used if not part.is_task), PartConfig(source=used[0].source))
    needles = next((part for part in used if part.is_task), PartConfig(kind="multikey", source=used[0].source))
    task = dataclasses.replace(needles.task, answer_weight=1.0, needle_weight=0.0, query_weight=0.0, haystack_weight=0.0)
    words = dataclasses.replace(needles.questions, answer_weight=1.0, fact_weight=0.0, question_weight=0.0, haystack_weight=0.0)
    needles = dataclasses.replace(needles, task=task, questions=words)
    plain = {"weight": 1.0, "loss_weight": 1.0, "remap": "none", "pose_chunks": 2}
    corpus = Corpus(config) if corpus is None else corpus
    halves = []
    for part, count in ((text, rows - rows // 2), (needles, rows // 2)):
        single = dataclasses.replace(config, parts={"probe": dataclasses.replace(part, **plain)})
        halves.append(Loader(single, seq_len, count, seed, corpus=corpus, split="heldout").batch(0))
    return jax.tree.map(lambda *x: np.concatenate(x), *halves)
