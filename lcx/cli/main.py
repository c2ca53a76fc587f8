"""Entry point of `lcx COMMAND [flags]`: find the command, parse its flags and call it."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from lcx.cli import distributed_flags, parse
from lcx.cli.commands import COMMANDS, WITHOUT_DEVICES, find_command, group
from lcx.core import host
from lcx.core.console import friendly_errors, say
from lcx.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; exits with status 0, or with 1 after a one-sentence error."""
    own = argv is None
    if own:
        host.take_huge_pages()
    argv = list(sys.argv[1:] if argv is None else argv)
    with host.ending() if own else contextlib.nullcontext(), friendly_errors(), parse.typed(argv):
        for word in argv:
            if any("\udc80" <= one <= "\udcff" for one in word):
                raise UserError(f"argument {word!r} contains bytes that are not valid UTF-8; pass UTF-8 text instead")
        if not argv or argv[0] in ("-h", "--help", "-help", "help"):
            say(usage(COMMANDS))
            return
        if (within := group(argv[0])) and (len(argv) == 1 or argv[1] in ("-h", "--help", "-help")):
            say(usage(within))
            return
        name, words = find_command(argv)
        use_host_devices(words)
        distributed_flags.stand_over(name, words)
        module = importlib.import_module(f"lcx.cli.{name.replace(' ', '_')}")
        values = _flags(module, name)
        if any(word in ("-h", "--help", "-help") for word in words):
            say(parse.help_text(name, module.__doc__, values))
            return
        rest = parse.parse(values, name, words)
        with distributed_flags.joined(name, values):
            module.main(values, rest)


def usage(commands: dict[str, str]) -> str:
    """The overview of commands that `lcx --help` prints."""
    width = max(map(len, commands))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in commands.items()]
    return "lcx COMMAND [flags]\n\n" + "\n".join(lines) + "\n\n`lcx COMMAND --help` shows a command's flags."


def use_host_devices(argv: Sequence[str]) -> None:
    """Apply `--host_devices=N`, which must take effect before JAX starts and so is read ahead of the other flags."""
    count = parse.given(argv, "host_devices") or ""
    if re.fullmatch(r"0*[1-9]\d*", count):
        # Loaded only now: JAX takes its time.
        from lcx.core import host_devices

        host_devices.split(int(count))


def _flags(module: ModuleType, name: str) -> flags.FlagValues:
    values = flags.FlagValues()
    module.define(values)
    if name in WITHOUT_DEVICES:
        return values
    flags.DEFINE_integer(
        "host_devices",
        None,
        "split the CPU into this many devices, to try out a mesh (default: one, or in training as many as share the heads)",
        lower_bound=1,
        flag_values=values,
    )
    return values
