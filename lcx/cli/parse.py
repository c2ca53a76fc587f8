"""Command lines to flag values, with readable help and a one-sentence error for any invalid flag or config file."""

from __future__ import annotations

import contextlib
import importlib.util
import keyword
import linecache
import logging
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import ml_collections
from absl import flags

from lcx.core.configs import nearest
from lcx.core.errors import UserError
from lcx.core.numbers import counted

CONFIG_HELP = "    --config.KEY=VALUE     change a value of the config, as in --config.seed=1; may be repeated\n"


OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(=?)(.*)", re.DOTALL)
"""A flag that changes a value of the config: "no", the key, an equals sign and the value, so far as they are there."""


def steps_key(config: ml_collections.ConfigDict) -> str:
    """The key of a config that says how many steps a run takes."""
    return "steps" if "steps" in config else "stages.STAGE.steps"


def parse(values: flags.FlagValues, command: str, words: Sequence[str]) -> list[str]:
    """Read the flags of a command line into `values`; returns the words that are not flags.

    Raises `UserError` for unknown flags, invalid values, and a config file that is missing, broken or lacks a key.
    """
    if _takes_config(values) and (path := given(words, "config")) is not None:
        config = load(path)
        words = [_emptied(config, word) for word in words]
    # ml_collections logs what it also raises.
    logging.getLogger("absl").setLevel(logging.ERROR)
    words = [_quoted(word) for word in words]
    try:
        with typed(words):
            return values([f"lcx {command}", *words])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_sentence(error, values, command)) from error


@contextlib.contextmanager
def typed(words: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv` to `words` for the time being: ml_collections looks for the overrides of a config only there."""
    before, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def load(path: str) -> ml_collections.ConfigDict:
    """The result of a config file's `get_config`; `path` may end in a colon and a variant to call it with."""
    filename, colon, variant = path.partition(":")
    loaded = module(filename)
    if not hasattr(loaded, "get_config"):
        raise UserError(f"--config={filename} has no get_config(); define one that returns a ConfigDict")
    try:
        config = loaded.get_config(*[variant] * bool(colon))
    except UserError:
        raise
    except Exception as error:
        _blame(filename, error)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={filename}: get_config() returned {type(config).__name__}; it must return a ConfigDict")
    return config


def module(filename: str) -> ModuleType:
    """A config file as a module; raises `UserError` when it is missing or broken."""
    if not Path(filename).is_file():
        raise UserError(f"--config={filename} does not exist or is not a file; name a config file such as configs/quickstart.py")
    spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={filename} is not a Python file; name a config file such as configs/quickstart.py")
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except UserError:
        raise
    except Exception as error:
        _blame(filename, error)
    return loaded


def _takes_config(values: flags.FlagValues) -> bool:
    """Whether `--config` is a Python file whose values flags change, and not a file of another kind."""
    return "config" in values and values["config"].flag_type() == "config object"


def help_text(command: str, about: str, values: flags.FlagValues) -> str:
    """The help of a command: what it does, and each flag with its meaning and default."""
    lines = []
    for flag in {id(values[name]): values[name] for name in values}.values():
        text = " ".join(flag.help.split())
        if flag.default not in (None, [], "", False) and "default" not in text:
            text += f" (default: {flag.default_as_str.strip(chr(39))})"
        name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
        lines.append(textwrap.fill(text, 120, initial_indent=f"    {name:<22} ", subsequent_indent=" " * 27) + "\n")
        if flag.name == "config" and _takes_config(values):
            lines.append(CONFIG_HELP)
    return f"{about.strip()}\n\nFlags of lcx {command}:\n{''.join(lines)}".rstrip()


def given(words: Sequence[str], name: str) -> str | None:
    """The value of a flag on a command line: the last one if it is repeated, None if it is absent."""
    found = None
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in (f"--{name}", f"-{name}") and (equals or i + 1 < len(words)):
            found = value if equals else words[i + 1]
    return found


def needed(values: flags.FlagValues, name: str, hint: str) -> str:
    """The value of a required flag; raises `UserError` with the `hint` if it is missing."""
    if not values[name].value:
        raise UserError(f"--{name} is missing; {hint}")
    return values[name].value


def overrides(config: ml_collections.ConfigDict, words: Sequence[str]) -> list[str]:
    """The overrides of a config on a command line that has been read, each as `--config.KEY=VALUE` whatever way it is written."""
    found, at = [], 0
    while at < len(words):
        match, at = OVERRIDE.fullmatch(words[at]), at + 1
        if match is None:
            continue
        no, key, equals, value = match.groups()
        if equals:
            found.append(f"--config.{key}={value}")
        elif no or isinstance(value_at(config, key), bool):
            found.append(f"--config.{key}={'false' if no else 'true'}")
        else:
            found.append(f"--config.{key}={words[at]}")
            at += 1
    return found


class Length(flags.ArgumentParser):
    """A flag's number of tokens, where K stands for 1,024 and M for 1,048,576."""

    syntactic_help = "a whole number of tokens, or one with K or M"

    def parse(self, argument: str | int) -> int:
        """The number; raises ValueError for what is none."""
        if isinstance(argument, int):
            return argument
        match = re.fullmatch(r"\s*([+-]?[0-9]+)([kKmM]?)\s*", argument)
        if match is None:
            raise ValueError(f"{argument!r} is not {self.syntactic_help}")
        return int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()]


def define_length(name: str, default: int | None, text: str, values: flags.FlagValues) -> None:
    """Define a flag that is a `Length`."""
    flags.DEFINE(Length(), name, default, text, values, flags.ArgumentSerializer())


def lengths(values: flags.FlagValues) -> list[int]:
    """The numbers of `--lengths`, each a `Length`; raises `UserError` for what is none."""
    found = []
    for text in values.lengths:
        try:
            found.append(Length().parse(text))
        except ValueError as error:
            raise UserError(f"--lengths: {error}") from error
    return found


def nothing_left(rest: Sequence[str], command: str, path: str | None = None) -> None:
    """Raises `UserError` for a word that is not a flag, for commands that take only flags; `path` is the one that names a path."""
    if rest:
        meant = f"did you mean --{path}={rest[0]}?" if path and Path(rest[0]).exists() else f"see lcx {command} --help"
        raise UserError(f"unexpected argument {rest[0]!r}; {meant}")


def _emptied(config: ml_collections.ConfigDict, word: str) -> str:
    """A word, with `--config.KEY=` of a tuple made `--config.KEY=()`; raises `UserError` for a key that is not there."""
    match = OVERRIDE.match(word)
    if match is None:
        return word
    value, is_empty = value_at(config, match[2]), match[3] and not match[4]
    return f"{word}()" if is_empty and isinstance(value, tuple) else word


def _quoted(word: str) -> str:
    """`--config.positions.global.theta=1` with `['global']`: ml_collections parses keys as Python, where `global` is a keyword."""
    key, equals, value = word.partition("=")
    if not OVERRIDE.match(key):
        return word
    first, *parts = key.split(".")
    return first + "".join(f"[{part!r}]" if keyword.iskeyword(part) else f".{part}" for part in parts) + equals + value


def value_at(config: Any, key: str) -> Any:
    """What a config has under a dotted key; raises `UserError` with the nearest field where that is nothing."""
    place, parts = "config", re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", key).split(".")
    if parts[0] == "model":
        # JAX is imported with it, which commands without a model do without.
        from lcx.model.execution import refuse_moved

        refuse_moved(".".join(["--config", *parts]))
    for part in parts:
        if isinstance(config, Mapping | ml_collections.ConfigDict):
            if part not in config:
                raise UserError(f"--config.{key}: {place} has no field {part!r}{nearest(part, config)}")
            config = config[part]
        elif isinstance(config, list | tuple) and part.isdigit():
            if int(part) >= len(config):
                entries = counted(len(config), "entry", "entries")
                raise UserError(f"--config.{key}: {place} has {entries} but no index {part}; indices start at 0")
            config = config[int(part)]
        elif config is not None:
            raise UserError(f"--config.{key}: {place}={config!r} is of type {type(config).__name__} and has no field {part!r}")
        else:
            raise UserError(f"--config.{key}: {place} is None; set it as a whole in the config file")
        place = f"{place}.{part}"
    return config


def _blame(filename: str, error: Exception) -> NoReturn:
    """Raise a one-sentence error that names the failing line of the config file, and its text."""

    def is_here(other: str | None) -> bool:
        return other is not None and Path(other).resolve() == Path(filename).resolve()

    line = error.lineno if isinstance(error, SyntaxError) and is_here(error.filename) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if is_here(frame.filename):
            line = frame.lineno
    what = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    text = "" if line is None else linecache.getline(str(Path(filename).resolve()), line).strip()
    quoted = f" (`{textwrap.shorten(text, 100, placeholder=' …')}`)" if text else ""
    at = "" if line is None else f", line {line}{quoted}"
    raise UserError(f"--config={filename}{at}: {type(error).__name__}: {what}; fix the config file") from error


def _sentence(error: Exception, values: flags.FlagValues, command: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname.partition("=")[0].lstrip("-")
        if name.startswith("config.") and _takes_config(values):
            return f"--{name} overrides a config value but --config is missing; name a file such as configs/quickstart.py"
        known = {f"--{flag.name}" for flag in (values[known] for known in values)}
        return f"unknown flag --{name} for lcx {command}{nearest(f'--{name}', known)}"
    if (found := re.match(r"flag --([^=]+)=(.*?): ", text)) and found[1] in values:
        name, value = found.groups()
        flag = values[name]
        names = ["true", "false"] if flag.boolean else getattr(flag.parser, "enum_values", [])
        wanted = " or ".join(names) or flag.parser.syntactic_help or "another value"
        usual = "" if names or flag.default in (None, [], "") else f", such as {flag.default}"
        return f"invalid value --{name}={value}: expected {wanted}{usual}"
    if found := re.match(r"Found (\S+) in argv before", text):
        return f"{found[1]} comes before --config; name the config file first"
    if text.startswith("Missing value"):
        return f"m{text[1:]}; write it after an equals sign"
    return text[:1].lower() + text[1:]
