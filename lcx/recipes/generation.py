"""Text from prompts: tokens to text as they come, stop strings, and where the weights of a run are placed for it.

Legend: B prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lcx.core.console import warn
from lcx.core.errors import UserError
from lcx.core.mesh import mesh_of
from lcx.core.trees import Tree
from lcx.data.chat import chat
from lcx.data.chat.chat import Chat, Message
from lcx.data.tokenizers import tokenizers
from lcx.data.tokenizers.stream import NEIGHBOURS, Stream
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.evals.zero_shot import at_length, check, refuse_learned
from lcx.model.architecture import build_architecture
from lcx.model.config import ModelConfig
from lcx.model.decode import Timings, generate
from lcx.model.execution import ExecutionConfig
from lcx.model.sampling import GREEDY, Sampling
from lcx.positions.scheme import Scheme
from lcx.training.loading import Loaded

OnText = Callable[[int, str], None]
"""`(prompt, piece)`: what was added to the text of a prompt."""

OnEnd = Callable[[int, "Completion"], None]
"""`(prompt, completion)`: a prompt's text has ended."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt: text without the stop string, the new tokens, and why it ended.

    `ended` is "stop" (a stop string), "eos" (the end-of-sequence token, which gives no text) or "length".
    """

    text: str
    tokens: np.ndarray
    ended: str


def generate_text(
    params: Tree,
    model: ModelConfig,
    execution: ExecutionConfig,
    schemes: Mapping[str, Scheme],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    trained: int | None = None,
    positions: str = "none",
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    chunk: int | None = None,
    ask: Chat | None = None,
    system: str | None = None,
    on_text: OnText | None = None,
    on_end: OnEnd | None = None,
    report: Callable[[Timings], None] | None = None,
) -> list[Completion]:
    """Continue texts. `schemes` maps layer kinds to the scheme that the weights were trained under, up to `trained` tokens.

    A row ends before the first of the `stop` strings, at the tokenizer's end-of-sequence token or another of `stop_ids`, or after
    `max_new_tokens`. A prompt begins as `data.tokenizers.tokenizers.prompt` says; with the chat template of `ask` it is what a user
    says, after the message `system`, and the text is the model's answer. `on_text` hears of new text of a prompt as soon as no
    later token can change it: never half a character, nor what may become a stop string; `on_end` of each prompt's end.

    `positions` is a scheme to try zero-shot (`evals.zero_shot.at_length`). Frequencies are those for the longest prompt plus
    `max_new_tokens`; beyond `trained` a warning is given. Rows and caches are split over the mesh that the weights are placed on.
    Raises `UserError` for prompts and stop strings that are empty, and for numbers that do not fit.
    """
    if system is not None and ask is None:
        raise UserError("a system message needs a chat template; ask for the chat, or write the message into the prompt")
    rows = [_encode(tokenizer, prompt, i, model.vocab_size, ask, system) for i, prompt in enumerate(prompts)]
    if not rows:
        raise UserError("no prompt given; give at least one")
    if "" in stop:
        raise UserError("a stop string is empty; omit it, or give text to stop at")
    length = max(map(len, rows)) + max_new_tokens
    if length > 2**31 - 1:
        raise UserError(f"max_new_tokens={max_new_tokens:,} exceeds the number of int32 positions; lower it")
    chosen = schemes_for(model, schemes, check(positions), trained, length)
    arch, buffers = build_architecture(model, execution, chosen, length)
    eos = end_ids(tokenizer, stop_ids, ask)
    streams = [Stream(tokenizer, stop, row[-NEIGHBOURS:]) for row in rows]
    ended: dict[int, Completion] = {}

    def give(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    def end(row: int, why: str) -> None:
        give(row, streams[row].finish())
        ended[row] = Completion(streams[row].text, streams[row].tokens, why)
        if on_end is not None:
            on_end(row, ended[row])

    def on_token(step: int, new: Mapping[int, int]) -> list[int]:
        for row, token in new.items():
            give(row, streams[row].add(token))
            if streams[row].stopped or token in eos:
                end(row, "stop" if streams[row].stopped else "eos")
        return [row for row in new if row in ended]

    with mesh_of(params):
        generate(
            params, buffers, arch, rows, max_new_tokens,
            sampling=sampling, stop_ids=eos, chunk=chunk, on_token=on_token, report=report,
        )  # fmt: skip
    for row in range(len(rows)):
        if row not in ended:
            end(row, "length")
    return [ended[row] for row in range(len(rows))]


def _encode(tokenizer: Tokenizer, prompt: str, number: int, vocab_size: int, ask: Chat | None, system: str | None) -> np.ndarray:
    if not len(tokenizer.encode(prompt)):
        raise UserError(f"prompt {number + 1} is empty; write at least one character")
    tokens = tokenizers.prompt(tokenizer, prompt) if ask is None else ask.prompt([*opening(system), said("user", prompt)])
    refuse_foreign(tokens, vocab_size, f"prompt {number + 1}")
    return tokens


def refuse_foreign(tokens: np.ndarray, vocab_size: int, what: str) -> None:
    """Raises `UserError` where a token is none of the model's."""
    if len(tokens) and tokens.max() >= vocab_size:
        raise UserError(
            f"{what} has token {tokens.max()}, but the model's vocabulary ends at {vocab_size - 1}; "
            "the tokenizer belongs to another model"
        )


def said(role: str, text: str) -> Message:
    """A message of a chat."""
    return {"role": role, "content": text}


def opening(system: str | None) -> list[Message]:
    """The messages that a chat begins with: the system's, if there is one."""
    return [] if system is None else [said("system", system)]


def chat_of(loaded: Loaded, name: str | Path, template: str | None = None, option: str = "chat_template") -> Chat:
    """The tokenizer of loaded weights with the chat template in the file `template`, or with that of their run, or with its own.

    `name` is the model's and `option` what names a template's file, for errors. Raises `UserError` if there is no template.
    """
    tokenizer, template = tokenizers.load(loaded.run.data.tokenizer), template or loaded.run.data.chat_template
    if template is None and not chat.has_template(tokenizer):
        raise UserError(f"{name} has no chat template; name a file with one with {option}=FILE, or have text continued instead")
    return chat.load(tokenizer, template, option)


def end_ids(tokenizer: Tokenizer, stop_ids: Sequence[int], ask: Chat | None) -> tuple[int, ...]:
    """The tokens at which a text ends: the tokenizer's, those that the model's files name, and that of a chat's turns."""
    found = (tokenizer.eos_id, *stop_ids, None if ask is None else ask.end_id)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def schemes_for(
    model: ModelConfig, schemes: Mapping[str, Scheme], positions: str, trained: int | None, length: int
) -> Mapping[str, Scheme]:
    """The schemes, or those of `positions`, for `length` tokens; warns where the weights were `trained` for fewer.

    Raises `UserError` for schemes with parameters that the weights do not have.
    """
    if trained is not None and length > trained and positions.strip() == "none":
        warn(
            f"up to {length:,} tokens are wanted, but the weights were trained up to {trained:,}; beyond that "
            "quality may drop; --positions tries another scheme"
        )
    chosen = at_length(schemes, positions, trained or length, length)
    refuse_learned(positions, {kind: x for kind, x in chosen.items() if x != schemes[kind]}, model, length)
    return chosen


LINE = '{"prompt": "..."}'


def read_prompts(path: str) -> list[str]:
    """The prompt that a text file is, or those that the lines of a `.jsonl` file hold under `prompt`.

    Raises `UserError` for a file that is missing, is not UTF-8 or holds something else.
    """
    text = read_text(path, "prompt file", f"name a text file, or a .jsonl file with lines such as {LINE}")
    if Path(path).suffix != ".jsonl":
        return [text]
    return [_prompt_of(line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_text(path: str, what: str = "file", way_out: str = "name a text file") -> str:
    """A UTF-8 text; raises `UserError`, which says `what` the file is, if it is missing, empty or something else."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{what} {path} {'is not a file' if file.exists() else 'does not exist'}; {way_out}")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start} is {byte:#04x}); convert it")
    if not text.strip():
        raise UserError(f"{what} {path} is empty; write {'a prompt' if what == 'prompt file' else 'text'} into it")
    return text


def _prompt_of(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); write lines such as {LINE}")
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{where} has no text under 'prompt'; write lines such as {LINE}")
    return prompt
