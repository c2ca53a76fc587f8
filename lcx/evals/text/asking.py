"""Asking: only what the log does not hold, each answer on the disk as it comes."""

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
    started = time.perf_counter()
    for outputs in backend.complete([items[i] for i in missing], new_tokens) if missing else ():
        seconds = (time.perf_counter() - started) / len(outputs)
        for at, output in outputs.items():
            i, item = missing[at], items[missing[at]]
            log.add(
                keys[i], task=task, scheme=backend.scheme, model=backend.fingerprint, length=length, number=i, depth=item.depth,
                fill=fills[i], seconds=seconds, asked=item.text[-TAIL:], references=item.references, output=output,
                score=score(item, output),
            )  # fmt: skip
        started = time.perf_counter()
    return [log.known(key)["output"] for key in keys]
