"""Tokenise a corpus once into a dataset that runs read instead of the text. Rerun the same command to resume.

lcx data prepare --kind=text --path='books/**/*.txt' --tokenizer=tokenizer.json --out=data/books
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from lcx.core import configs
from lcx.core.configs import nearest
from lcx.core.console import say
from lcx.core.errors import UserError, naming
from lcx.core.numbers import counted
from lcx.data.config import SourceConfig
from lcx.data.curation.dependency import LongCeSettings
from lcx.data.sources.prepare import Progress, prepare
from lcx.data.tokenizers import tokenizers

OF_SOURCE = [field.name for field in dataclasses.fields(SourceConfig) if field.name != "join"]
"""The settings of a source that are flags here; those about chats, which are not prepared, are none."""


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "directory to write the dataset to", flag_values=values)
    flags.DEFINE_string("kind", "stdlib", "stdlib, text, jsonl, parquet or tfds", flag_values=values)
    flags.DEFINE_multi_string("path", [], "files, as a glob pattern, or the name of a tfds dataset", flag_values=values)
    flags.DEFINE_string(
        "tokenizer", "bytes", "bytes, bytes+bos, bytes+eos, bytes+bos+eos, or a tokenizer's path", flag_values=values
    )
    flags.DEFINE_string("field", "text", "key, column or feature that holds the text", flag_values=values)
    flags.DEFINE_string("split", "train", "split of a tfds dataset", flag_values=values)
    flags.DEFINE_string("data_dir", None, "where tfds keeps its datasets", flag_values=values)
    flags.DEFINE_bool("include_tests", False, "also read the test packages of the standard library", flag_values=values)
    flags.DEFINE_bool("append_eos", False, "end each document with the end-of-sequence token", flag_values=values)
    flags.DEFINE_integer(
        "limit_bytes", None, "stop after the document in which this many bytes of text are reached", flag_values=values
    )
    flags.DEFINE_string("name", "lcx", "name of the dataset for TFDS", flag_values=values)
    flags.DEFINE_string("longce", None, "a model that weighs the tokens by how much a long context helps it", flag_values=values)
    flags.DEFINE_integer("longce_window", 32768, "tokens of the long context, as in training", flag_values=values)
    flags.DEFINE_integer(
        "longce_short", None, "tokens of the short one (an eighth, at most 4096)", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("shard_tokens", 1 << 24, "tokens per shard; finished shards survive an interruption", flag_values=values)


@naming({**{f"source.{name}": f"--{name}" for name in OF_SOURCE}, "shard_tokens": "--shard_tokens"})
def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Prepare the dataset."""
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; name files with --path=PATTERN")
    if values.out is None:
        raise UserError(f"--out is missing; name the directory to write, such as --out=data/{values.kind}")
    if values.kind == "array_record":
        raise UserError(f"--kind=array_record is the format this command writes, not reads{nearest('array_record', _text_kinds())}")
    if Path(values.out).exists() and not Path(values.out).is_dir():
        raise UserError(f"--out={values.out} is a file; name a folder")
    given = {name: values[name].value for name in OF_SOURCE}
    source = configs.build(SourceConfig, {**given, "path": tuple(values.path)}, "source")
    weigher = _weigher(values)
    done = prepare(
        source,
        values.tokenizer,
        values.out,
        name=values.name,
        shard_tokens=values.shard_tokens,
        report=_progress(time.perf_counter()),
    )
    if weigher is not None:
        weigher()
        say(f"loss weights by LongCE of {values.longce}, which runs that read the dataset use")
    say(f"dataset: {values.out}: {_size(done)} in {counted(done.shards, 'shard')}")
    say("to use it in a config:")
    say(f"    config.data.tokenizer = {values.tokenizer!r}")
    say(f"    config.data.parts.NAME.source = {{'kind': 'array_record', 'path': {values.out!r}}}")


def _weigher(values: flags.FlagValues) -> Callable[[], None] | None:
    """What adds the loss weights, its model loaded and its settings checked."""
    if values.longce is None:
        for name in ("longce_window", "longce_short"):
            if values[name].present:
                raise UserError(f"--{name} belongs to --longce, which is not given; add it or leave --{name} out")
        return None
    from lcx.recipes.longce import add_weights
    from lcx.recipes.reader import Reader, ReaderConfig

    short = values.longce_short or max(4, min(4096, values.longce_window // 8))
    settings = LongCeSettings(short, max(1, short // 4), values.longce_window)
    reader = Reader.load(ReaderConfig(values.longce))
    reader.check("longce_window", settings.window)
    if reader.tokenizer.fingerprint != tokenizers.load(values.tokenizer).fingerprint:
        raise UserError(f"--longce={values.longce} has another tokenizer than --tokenizer={values.tokenizer}; use the model's own")
    return lambda: add_weights(values.out, reader, settings, lambda shards: say(f"{counted(shards, 'shard')} weighed"))


def _text_kinds() -> tuple[str, ...]:
    return "stdlib", "text", "jsonl", "parquet", "tfds"


def _progress(start: float) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        seconds = time.perf_counter() - start
        say(f"{counted(progress.shards, 'shard')} written: {_size(progress)}, {seconds:,.0f} s")

    return report


def _size(progress: Progress) -> str:
    return f"{counted(progress.documents, 'document')}, {counted(progress.tokens, 'token')}"
