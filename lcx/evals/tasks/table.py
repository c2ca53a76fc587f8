"""The benchmarks by name; a new one is a file in this folder and a row here."""

from __future__ import annotations

from lcx.evals.base import Task
from lcx.evals.tasks.needles import GeneratedNeedles, Needles
from lcx.evals.tasks.perplexity import Perplexity

TASKS: dict[str, type[Task]] = {task.name: task for task in (Needles, GeneratedNeedles, Perplexity)}
