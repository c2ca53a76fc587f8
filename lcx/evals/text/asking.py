"""Asking: only what the log does not hold, batch by batch, each answer on the disk before the next batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lcx.evals.answers import AnswerLog, key_of
from lcx.evals.base import Backend, Item

TAIL = 400
"""Characters of a prompt's end that are kept with its answer."""


def ask(
    backend: Backend,
    log: AnswerLog,
    task: str,
    version: int,
    length: int,
    items: Sequence[Item],
    fills: Sequence[float],
    new_tokens: int,
    score: Callable[[Item, str], float],
) -> list[str]:
    """The answer to every item, from the log or from the model, which then goes into the log with its score and its `fills`."""
    named = (task, version, length, new_tokens, backend.fingerprint)
    keys = [key_of(*named, number, tokens=item.prompt) for number, item in enumerate(items)]
    missing = [i for i, key in enumerate(keys) if log.known(key) is None]
    for first in range(0, len(missing), backend.batch):
        group, started = missing[first : first + backend.batch], time.perf_counter()
        outputs = backend.complete([items[i] for i in group], new_tokens)
        seconds = (time.perf_counter() - started) / len(group)
        for i, output in zip(group, outputs, strict=True):
            item = items[i]
            log.add(
                keys[i], task=task, scheme=backend.scheme, model=backend.fingerprint, length=length, number=i, depth=item.depth,
                fill=fills[i], seconds=seconds, asked=item.text[-TAIL:], references=item.references, output=output,
                score=score(item, output),
            )  # fmt: skip
    return [log.known(key)["output"] for key in keys]
