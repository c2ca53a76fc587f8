"""Chat with a checkpoint under its chat template; what was said stays in the cache. /help lists commands, Ctrl-C ends an answer.
Where questions come from a file or a pipe, a line each, standard output gets the answers and nothing else.

lcx chat --checkpoint=models/Llama-3.2-1B-64K --file=book.txt --system='Answer from the text.'
echo 'What is a context window?' | lcx chat --checkpoint=models/Llama-3.2-1B-Instruct
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import rich.console
import rich.status
from absl import flags

from lcx.cli import config_flags, parse, sampling_flags
from lcx.core import console
from lcx.core.configs import nearest
from lcx.core.errors import UserError, naming
from lcx.evals import zero_shot
from lcx.recipes import models
from lcx.recipes.conversation import Conversation
from lcx.recipes.generation import chat_of, read_text

HELP = {
    "/help": "this list",
    "/context": "what the context is used for",
    "/file PATH": "put a text before the next question",
    "/reset": "begin again; texts of --file stay, in the cache too",
    "/quit": "end the chat, as Ctrl-D does",
}
NEARLY_FULL = 0.9
"""Share of the declared length from which on a warning is given."""


def define(values: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "checkpoint", None, "a run's workdir, one of its checkpoints, a Hugging Face folder or a GGUF file", flag_values=values
    )
    flags.DEFINE_string("stage", None, "use the weights from the end of this stage (default: the newest)", flag_values=values)
    flags.DEFINE_multi_string("file", [], "a text to put before the first question", flag_values=values)
    flags.DEFINE_string("system", None, "the system message", flag_values=values)
    flags.DEFINE_string("chat_template", None, "a file with another chat template (jinja2)", flag_values=values)
    sampling_flags.define(values, 512, "answer")
    flags.DEFINE_string("positions", "none", "positional scheme to try zero-shot, such as yarn:factor=4", flag_values=values)
    parse.define_length("length", None, "tokens that the chat may have (default: what the weights were trained for)", values)
    config_flags.define_dtype(values)


@naming(sampling_flags.NAMES)
def main(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Chat."""
    parse.nothing_left(rest, "chat", "checkpoint")
    checkpoint = parse.needed(values, "checkpoint", "name a run's workdir, a Hugging Face folder or a GGUF file")
    conversation = _begun(values, checkpoint)
    for path, part in zip(values.file, conversation.parts()[-len(values.file) :], strict=False):
        console.say(f"{path}: {part.tokens:,} tokens, put before the first question", stderr=True)
    talk = _Talk(conversation)
    if not _at_terminal():
        for line in _lines():
            if not talk.take(line):
                return
        return
    console.say(
        f"{checkpoint}: a context of {conversation.length:,} tokens; /help lists commands, Ctrl-D ends the chat", stderr=True
    )
    for line in _typed():
        try:
            if not talk.take(line):
                return
        except UserError as error:
            console.print_error(str(error))


def _begun(values: flags.FlagValues, checkpoint: str) -> Conversation:
    zero_shot.check(values.positions, "--positions")
    sampling = sampling_flags.chosen(values)
    texts = [read_text(path) for path in values.file]
    loaded = models.load(checkpoint, stage=values.stage, dtype=values.dtype)
    # The weights as they were loaded are not held beyond this function, as the conversation has its own.
    return Conversation(
        loaded, chat_of(loaded, checkpoint, values.chat_template, "--chat_template"),
        length=values.length, positions=values.positions, system=values.system, texts=texts,
        sampling=sampling, max_new_tokens=values.max_new_tokens, stop=values.stop,
    )  # fmt: skip


class _Talk:
    """Takes what a user types: questions, and commands that begin with a slash."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._err = conversation, console.console(stderr=True)

    def take(self, line: str) -> bool:
        """Answer a question or obey a command; false where that ends the chat."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        command, _, argument = line.partition(" ")
        known = [name.split()[0] for name in HELP]
        if command not in known:
            raise UserError(f"there is no command {command}{nearest(command, known)}")
        if argument and command != "/file":
            raise UserError(f"{command} takes nothing behind it; got {argument.strip()!r}")
        match command:
            case "/help":
                width = max(map(len, HELP))
                console.say("\n".join(f"{name.ljust(width)}  {text}" for name, text in HELP.items()), stderr=True)
            case "/context":
                self._context()
            case "/file":
                self._add(argument.strip())
            case "/reset":
                self._conversation.reset()
                self._meter()
        return command != "/quit"

    def _answer(self, question: str) -> None:
        talk = self._conversation
        with _interruptible() as is_stopped, _Reading(self._err) as reading:

            def on_text(piece: str) -> None:
                reading.stop()
                sys.stdout.write(piece)
                sys.stdout.flush()

            answer = talk.ask(question, on_text, reading, is_stopped)
        if len(answer.tokens):
            sys.stdout.write("\n")
            sys.stdout.flush()
        if answer.ended == "interrupted":
            note = "the answer was interrupted" if len(answer.tokens) else "interrupted; the question is not part of the chat"
            self._err.print(f"[dim]{note}[/]")
        elif answer.ended == "length" and talk.used < talk.length:
            self._err.print(f"[dim]the answer was cut after {len(answer.tokens):,} tokens; --max_new_tokens allows more[/]")
        self._meter()

    def _meter(self) -> None:
        used, length = self._conversation.used, self._conversation.length
        share, bar = used / length, ""
        if self._err.is_terminal:
            full = min(20, round(20 * share))
            colour = "red" if share >= NEARLY_FULL else "yellow" if share >= 0.75 else "green"
            bar = f"[{colour}]{'━' * full}[/]{'─' * (20 - full)} "
        self._err.print(f"[dim]{bar}{used:,} of {length:,} tokens ({100 * share:.0f}%)[/]")
        if share >= NEARLY_FULL:
            left = "is full" if used >= length else f"has room for {length - used:,} more tokens"
            console.warn(f"the context {left}; /reset begins a new one, and --length declares another length")

    def _context(self) -> None:
        talk = self._conversation
        parts = talk.parts()
        rows = [(part.role, _start(part.text), f"{part.tokens:,}") for part in parts]
        if talk.used:
            asked = sum(part.tokens for part in parts if not part.role.startswith("before"))
            rows.append(("the template", "marks of turns", f"{max(0, talk.used - asked):,}"))
        console.table("Context", ("from", "begins", "tokens"), rows, stderr=True, left=2)
        console.say(f"{len(talk.cached):,} tokens are in the cache", stderr=True)
        self._meter()

    def _add(self, path: str) -> None:
        if not path:
            raise UserError("/file needs the path of a text file, as in /file book.txt")
        count = self._conversation.add(read_text(path))
        console.say(f"{path}: {count:,} tokens, put before the next question", stderr=True)


class _Reading:
    """Says on a terminal how much of a prompt is read while it is; called with the tokens that are and with all of them."""

    def __init__(self, err: rich.console.Console) -> None:
        self._err, self._first = err, 0
        self._status: rich.status.Status | None = None

    def __enter__(self) -> "_Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, read: int, total: int) -> None:
        if not self._err.is_terminal:
            return
        text = f"[dim]{read:,} of {total:,} tokens read[/]"
        if self._status is None:
            self._status = self._err.status(text, spinner="dots")
            self._status.start()
        self._status.update(text)

    def stop(self) -> None:
        """Clear the line."""
        if self._status is not None:
            self._status.stop()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed in the body, where the first time does nothing else; the second ends the program."""
    pressed = []

    def press(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _typed() -> Iterator[str]:
    """Lines typed at a terminal until its end; Ctrl-C drops the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    # The marks tell readline which characters take no room.
    prompt = "\001\033[1;36m\002>\001\033[0m\002 "
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except EOFError:
            sys.stdout.write("\n")
            return


def _lines() -> Iterator[str]:
    """Lines of standard input; raises `UserError` for what is not UTF-8."""
    try:
        for line in sys.stdin:
            line.encode()
            yield line
    except UnicodeError:
        raise UserError("standard input is not UTF-8 text; convert it") from None


def _start(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"{words[:59]}…"
