"""The retrieval tasks by name; a new one is a file in this folder and a row here."""

from __future__ import annotations

from lcx.core.configs import choice
from lcx.data.tasks.base import RetrievalTask, TaskConfig
from lcx.data.tasks.key_value import KeyValue
from lcx.data.tasks.multikey import Multikey
from lcx.data.tasks.passkey import Passkey
from lcx.data.tasks.variable_tracking import VariableTracking
from lcx.data.tokenizers.tokenizers import Tokenizer

TASKS: dict[str, type[RetrievalTask]] = {
    "passkey": Passkey,
    "multikey": Multikey,
    "variable_tracking": VariableTracking,
    "key_value": KeyValue,
}


def make_task(kind: str, config: TaskConfig, tokenizer: Tokenizer) -> RetrievalTask:
    """The sampler of one kind of task; raises `UserError` with the nearest name for another."""
    return TASKS[choice("task.kind", kind, TASKS)](config, tokenizer)
