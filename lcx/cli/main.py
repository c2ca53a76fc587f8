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
from lcx.core import host
from lcx.core.configs import nearest
from lcx.core.console import friendly_errors, say
from lcx.core.errors import UserError

COMMANDS = {
    "run": "train the stages of a config, evaluate before and after, and write the report",
    "train": "train the stages of a config; resumes from its workdir",
    "eval": "evaluate a checkpoint, under its own or any other positional scheme",
    "harness": "evaluate a checkpoint with EleutherAI's lm_eval",
    "generate": "continue prompts with a checkpoint, under its own or any other positional scheme",
    "chat": "chat with a checkpoint in the terminal, under its chat template",
    "report": "rewrite a run's report.html from its files",
    "launch": "start a run, or each point of a sweep, on many hosts: Google Cloud, Kubernetes, Slurm, SkyPilot, or here",
    "sweep": "run the unfinished points of a sweep, then print a table and draw a plot",
    "doremi": "find weights for the parts of a mixture with a reference and a proxy run",
    "plan": "say whether a config fits chips that need not be here, what its steps take, and what it costs",
    "theta": "choose theta for a target length",
    "import": "convert a Hugging Face folder or a GGUF file to a run's checkpoint",
    "export": "write a run's weights as a Hugging Face folder or a GGUF file, or its adapters for peft",
    "extract": "extract what a fine-tune adds to its base, as an adapter or as differences",
    "apply": "lay an adapter or differences over a model, into a new Hugging Face folder",
    "merge": "merge models tensor by tensor into a new Hugging Face folder",
    "diff": "compare two models tensor by tensor",
    "verify": "compare checkpoints, models and data with their checksums",
    "compare": "compare two evaluations on the same items, paired",
    "data curate": "filter and deduplicate sources of text, and say what was dropped and why",
    "data prepare": "tokenise a corpus once into a dataset that runs read",
    "data inspect": "print and plot what a config's data mixture contains",
}
"""Command -> what it does. Each is a module of this package with `define(values)` and `main(values, rest)`."""


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
        name, words = _command(argv)
        if name not in COMMANDS:
            within = {known: text for known, text in COMMANDS.items() if known.startswith(f"{name} ")}
            say(usage(within))
            return
        use_host_devices(words)
        distributed_flags.stand_over(name, words)
        module = importlib.import_module(f"lcx.cli.{name.replace(' ', '_')}")
        values = _flags(module)
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


def _command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command, or the group of commands (`data`) whose help is requested, that the words begin with; and the other words."""
    for count in (2, 1):
        if (name := " ".join(argv[:count])) in COMMANDS:
            return name, list(argv[count:])
    within = [name.removeprefix(f"{argv[0]} ") for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if within and (len(argv) == 1 or argv[1] in ("-h", "--help", "-help")):
        return argv[0], []
    if within:
        raise UserError(f"lcx {argv[0]} has no command {argv[1]!r}{nearest(argv[1], within)}")
    raise UserError(f"lcx has no command {argv[0]!r}{nearest(argv[0], [*COMMANDS, *{name.split()[0] for name in COMMANDS}])}")


def _flags(module: ModuleType) -> flags.FlagValues:
    values = flags.FlagValues()
    module.define(values)
    flags.DEFINE_integer(
        "host_devices",
        None,
        "split the CPU into this many devices, to try out a mesh (default: one, or in training as many as share the heads)",
        lower_bound=1,
        flag_values=values,
    )
    return values
