"""The flags that commands share: `--config=FILE`, `--config.KEY=VALUE` and `--workdir`."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from lcx.cli import parse
from lcx.core.console import warn
from lcx.core.errors import UserError


def define(values: flags.FlagValues, workdir: bool = True) -> None:
    """Define `--config` with its overrides and, for commands that write a run, `--workdir`."""
    config_flags.DEFINE_config_file("config", None, "Python file that defines get_config()", flag_values=values)
    if workdir:
        flags.DEFINE_string(
            "workdir", None, "directory of the run (default: runs/ plus the name of the config)", flag_values=values
        )


def define_profile(values: flags.FlagValues) -> None:
    """Define `--profile`, for commands that train."""
    flags.DEFINE_string(
        "profile",
        None,
        "first and last step to trace for xprof, as in 10:13; kept in WORKDIR/profile; 10:13@0,3 traces processes 0 and 3, "
        "10:13@all all of them (default: process 0)",
        flag_values=values,
    )


def define_dtype(values: flags.FlagValues) -> None:
    """Define `--dtype`, for commands that use the weights of a model."""
    text = (
        "dtype of the weights: float32, bfloat16, float16 or auto, which for Hugging Face folders and GGUF files is bfloat16 on "
        "TPUs and GPUs that multiply it, float32 on CPUs"
    )
    flags.DEFINE_string("dtype", "auto", text, flag_values=values)


def chosen(values: flags.FlagValues, rest: Sequence[str]) -> ml_collections.ConfigDict:
    """The config with the overrides of the command line."""
    # Orbax logs every step of its own work below this level.
    logging.getLogger("absl").setLevel(logging.WARNING)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; set config values with --config.KEY=VALUE")
    if values.config is None:
        raise UserError("--config is missing; name a file such as configs/quickstart.py")
    complete = getattr(module(values), "complete", None)
    config = values.config if complete is None else complete(values.config)
    _remark(config, overrides(values))
    return config


def read(values: flags.FlagValues, rest: Sequence[str]) -> tuple[ml_collections.ConfigDict, Path]:
    """The config and the workdir that the flags name."""
    config = chosen(values, rest)
    if values.workdir == "":
        raise UserError("--workdir= is empty; name a directory or omit the flag")
    return config, Path(values.workdir or Path("runs") / title(values))


def title(values: flags.FlagValues) -> str:
    """The name of the config, with its variant."""
    name, variant = _file_and_variant(values)
    return "_".join(x for x in (Path(name).stem, variant) if x)


def fewer_steps(values: flags.FlagValues) -> str:
    """The flag that makes a run of the config shorter."""
    return f"--config.{parse.steps_key(values.config)}"


def filename(values: flags.FlagValues) -> str:
    """The path of the config file, without the variant after a colon."""
    return _file_and_variant(values)[0]


def module(values: flags.FlagValues) -> ModuleType:
    """The config file as a module, for functions other than `get_config`."""
    return parse.module(filename(values))


def overrides(values: flags.FlagValues) -> list[str]:
    """The overrides of the config on the command line, each as `--config.KEY=VALUE`."""
    return parse.overrides(values.config, sys.argv[1:])


def command() -> list[str]:
    """The command line as it was typed, for the record."""
    program = Path(sys.argv[0]).name
    return ["lcx" if program in ("__main__.py", "lcx") else program, *sys.argv[1:]]


def text(words: Sequence[str]) -> str:
    """A command line, quoted for a shell."""
    return shlex.join(words)


def _file_and_variant(values: flags.FlagValues) -> tuple[str, str]:
    name, _, variant = values["config"].config_filename.partition(":")
    return name, variant


def _remark(config: ml_collections.ConfigDict, given: Sequence[str]) -> None:
    """Warn of overrides that have no effect because every stage sets its own value, unless the config is refused as a whole."""
    idle = list(_idle(config, given))
    if not idle:
        return
    from lcx.recipes.recipe import recipe

    with contextlib.suppress(UserError):
        recipe(config)
        for sentence in idle:
            warn(sentence)


def _idle(config: ml_collections.ConfigDict, given: Sequence[str]) -> Iterator[str]:
    """A sentence about each override that has no effect."""
    stages = config.get("stages") or {}
    if not isinstance(stages, Mapping | ml_collections.ConfigDict):
        return  # made by the config's `complete`, of the flags
    for word in given:
        found = re.match(r"--config\.(?:data\.)?((?:optim|parts)\.[^=]+)=", word)
        if found and stages and all(_has(stage, found[1].split(".")) for stage in stages.values()):
            names = ", ".join(stages)
            yield f"{word} has no effect: every stage sets its own; use --config.stages.STAGE.{found[1]} with STAGE one of {names}"


def _has(tree: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(tree, Mapping | ml_collections.ConfigDict) or part not in tree:
            return False
        tree = tree[part]
    return True
