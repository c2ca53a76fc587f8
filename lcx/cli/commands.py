"""The commands of lcx, and which of them a command line begins with."""

from __future__ import annotations

from collections.abc import Sequence

from lcx.core.configs import nearest
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

WITHOUT_DEVICES = ("report", "theta", "extract", "apply", "diff", "verify", "compare")
"""Commands that compute nothing on devices."""


def group(name: str) -> dict[str, str]:
    """The commands of a group such as `data`, by their whole names; none if there is no such group."""
    return {known: text for known, text in COMMANDS.items() if known.startswith(f"{name} ")}


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the words begin with, and the other words; raises `UserError` if they begin with none."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, list(words[count:])
    within = [name.removeprefix(f"{words[0]} ") for name in group(words[0])]
    if within and len(words) > 1:
        raise UserError(f"lcx {words[0]} has no command {words[1]!r}{nearest(words[1], within)}")
    if within:
        raise UserError(f"lcx {words[0]} is a group of commands; name one of {', '.join(within)}")
    raise UserError(f"lcx has no command {words[0]!r}{nearest(words[0], dict.fromkeys(name.split()[0] for name in COMMANDS))}")
