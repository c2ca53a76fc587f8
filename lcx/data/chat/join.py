"""Short conversations filtered, brought into one form, and joined into long ones.

Joined are conversations with the same system message, which the long one has once, at its beginning. So a template that asks for
`user` and `assistant` by turns takes the long one too, and what has a loss weight in it is what the assistant writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lcx.data.config import JoinConfig

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    "system": "system",
}
"""Names of roles in public collections -> ours."""

Turns = list[dict[str, str]]


class Usable(NamedTuple):
    """A conversation that can be joined: its `system` message ("" for none), and turns that begin with `user`."""

    name: str
    system: str
    turns: Turns


class Refused(Exception):
    """Why a conversation is left out, in a word or two."""


def reform(name: str, messages: Any, tools: Any, config: JoinConfig) -> Usable:
    """The conversation in one form; raises `Refused` for one that is left out.

    `messages` may be `{"role", "content"}` as everywhere in lcx, `{"from", "value"}` (ShareGPT), or texts of user and assistant by
    turns (UltraChat). White space around texts is removed, and a last question that nobody answers.
    """
    if tools:
        raise Refused("has_tools")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise Refused("not_a_conversation")
    found = [_message(i, message) for i, message in enumerate(messages)]
    system = found.pop(0)["content"] if found[0]["role"] == "system" else ""
    if len(found) % 2 and found[-1]["role"] == "user":
        found.pop()
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(found)) or len(found) % 2:
        raise Refused("not_by_turns")
    if not all(turn["content"] for turn in found):
        raise Refused("empty_turn")
    answers = [turn["content"] for turn in found[1::2]]
    if len(answers) < config.min_turns:
        raise Refused("too_few_turns")
    if sum(map(len, answers)) < config.min_chars:
        raise Refused("too_short")
    return Usable(name, system, found)


def _message(number: int, message: Any) -> dict[str, str]:
    if isinstance(message, str):
        return {"role": ("user", "assistant")[number % 2], "content": message.strip()}
    if not isinstance(message, Mapping):
        raise Refused("not_a_conversation")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if message.get("tool_calls") or role in ("tool", "function"):
        raise Refused("has_tools")
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused("not_text")
    if role not in ROLES:
        raise Refused("unknown_role")
    return {"role": ROLES[role], "content": content.strip()}


def join(conversations: Sequence[Usable], config: JoinConfig, length: Callable[[Turns], int]) -> list[list[Usable]]:
    """Groups of conversations to write one behind the other, each of at most `config.tokens` by `length` of their messages.

    One that is longer by itself is a group of its own. Conversations are in random order, each in one group; groups are full
    before the next begins, so that at most one for each system message is short.
    """
    assert config.tokens is not None
    by_system: dict[str, list[Usable]] = {}
    for one in conversations:
        by_system.setdefault(one.system, []).append(one)
    groups: list[list[Usable]] = []
    for system in sorted(by_system):
        own = by_system[system]
        random.Random(config.seed).shuffle(own)
        group: list[Usable] = []
        total = 0
        for one in own:
            size = length(messages([one]))
            if group and total + size > config.tokens:
                groups += _fitting(group, config.tokens, length)
                group, total = [], 0
            group.append(one)
            total += size
        groups += _fitting(group, config.tokens, length)
    return groups


def _fitting(group: list[Usable], most: int, length: Callable[[Turns], int]) -> list[list[Usable]]:
    """The group, in two if a template writes more for the whole than for its conversations one by one."""
    if len(group) < 2 or length(messages(group)) <= most:
        return [group]
    return [*_fitting(group[:-1], most, length), group[-1:]]


def messages(group: Sequence[Usable]) -> Turns:
    """The messages of the long conversation."""
    system = [{"role": "system", "content": group[0].system}] if group[0].system else []
    return [*system, *(turn for one in group for turn in one.turns)]
