"""Asks a model behind an endpoint to grade documents, for a quality classifier to learn from (`lcx.data.curation.labels`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lcx.data.curation.labels import Ask, EndpointLabels
from lcx.evals.backends.endpoint import EndpointBackend
from lcx.evals.base import Item
from lcx.evals.config import EndpointConfig

ANSWER_TOKENS = 16
"""Tokens that an answer may have: a grade, and a word or two in front of it."""


def ask(config: EndpointLabels) -> Ask:
    """What sends prompts to the endpoint as messages of a user; its answers come as they are ready.

    Raises `UserError` without the library openai, and for an endpoint that gives no answer in spite of all retries.
    """
    backend = EndpointBackend(
        EndpointConfig(config.url, config.model, "chat", config.concurrency, timeout=config.timeout, retries=config.retries)
    )

    def answers(prompts: Sequence[str]) -> Iterator[dict[int, str]]:
        none = np.zeros(0, np.int32)
        return backend.complete([Item(none, none, text=prompt, turns=(prompt,)) for prompt in prompts], ANSWER_TOKENS)

    return answers
