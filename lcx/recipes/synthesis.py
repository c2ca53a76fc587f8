"""The models that write synthetic documents (`lcx.data.curation.synthesize`): behind an endpoint, or on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.data.chat import chat
from lcx.data.curation.synthesize.generator import Answer, Generator
from lcx.data.curation.synthesize.settings import EndpointGenerator, GeneratorConfig, LocalGenerator
from lcx.data.tokenizers import tokenizers
from lcx.evals.backends.endpoint import EndpointBackend
from lcx.evals.base import Item, Reply
from lcx.evals.config import EndpointConfig
from lcx.model.sampling import GREEDY, Sampling
from lcx.recipes import models
from lcx.recipes.recipe import backend_of
from lcx.training.loading import Loaded

LENGTH = 8192
"""Tokens of a request and its answer, if neither the config nor the model says less: a cache for more would take memory in vain."""
_NONE = np.zeros(0, np.int32)


def generator(config: GeneratorConfig) -> Generator:
    """What `lcx data curate` asks; raises `UserError` without the library openai, and for what is not a model."""
    if config.endpoint is not None:
        return EndpointWriter(config, config.endpoint)
    assert config.local is not None
    loaded = models.load(config.local.model, stage=config.local.stage, dtype=config.local.dtype)
    return LocalWriter(config, config.local, loaded)


class EndpointWriter:
    """A model behind a server, which gets each request as a message of a user."""

    batch_size = 1

    def __init__(self, config: GeneratorConfig, endpoint: EndpointGenerator) -> None:
        self._config = config
        self._backend = EndpointBackend(
            EndpointConfig(
                endpoint.url, endpoint.model, "chat", endpoint.concurrency, timeout=endpoint.timeout, retries=endpoint.retries
            )
        )
        self.fingerprint = _fingerprint(config, endpoint.model)

    def __call__(self, requests: Sequence[str]) -> Iterator[dict[int, Answer]]:
        """The server's answers, as they come."""
        items = [Item(_NONE, _NONE, text=request, turns=(request,)) for request in requests]
        for found in self._backend.replies(items, self._config.max_tokens, self._config.temperature, self._config.stop):
            yield {number: _answer(reply) for number, reply in found.items()}


class LocalWriter:
    """A model on this machine.

    Greedily, as many requests as fit are answered side by side, always the same ones; at a temperature each by itself, with a seed
    of its own. Raises `UserError` for more tokens than the model was trained on.
    """

    def __init__(self, config: GeneratorConfig, local: LocalGenerator, loaded: Loaded) -> None:
        trained = loaded.meta.length
        self._config, self._length = config, local.length or min(LENGTH, trained)
        if self._length > trained:
            raise UserError(f"generator.local.length={self._length:,} exceeds the {trained:,} tokens of {local.model}; lower it")
        if config.max_tokens >= self._length:
            raise UserError(
                f"generator.max_tokens={config.max_tokens:,} leaves no room for a request in the {self._length:,} tokens of "
                f"{local.model}; lower it"
            )
        self._tokenizer = tokenizers.load(loaded.run.data.tokenizer)
        self._chat = chat.load(self._tokenizer) if chat.has_template(self._tokenizer) else None
        options: dict[str, Any] = {"tokens_per_forward": local.tokens_per_forward, "share_prefixes": False}
        self._backend = backend_of(loaded, self._length, **options)
        self.batch_size = 1 if config.temperature else self._backend.rows
        weights = f"{self._backend.fingerprint} {self._tokenizer.fingerprint} {self._length} {self.batch_size}"
        self.fingerprint = _fingerprint(config, weights)

    def __call__(self, requests: Sequence[str]) -> Iterator[dict[int, Answer]]:
        """The model's answers, batch by batch."""
        for first in range(0, len(requests), self.batch_size):
            prompts = [self._prompt(request) for request in requests[first : first + self.batch_size]]
            fits = [i for i, prompt in enumerate(prompts) if len(prompt) + self._config.max_tokens <= self._length]
            found = {first + i: Answer("", "too_long", 0, 0) for i in range(len(prompts)) if i not in fits}
            if fits:
                replies = self._batch([prompts[i] for i in fits], requests[first])
                found |= {first + i: _answer(reply) for i, reply in zip(fits, replies, strict=False)}
            yield found

    def _batch(self, prompts: list[np.ndarray], request: str) -> list[Reply]:
        """Replies, the first ones those of the prompts, of a batch that is filled up: all have the same shape."""
        prompts = [*prompts, *[prompts[0]] * (self.batch_size - len(prompts))]
        sampling = Sampling(self._config.temperature, seed=_seed(request)) if self._config.temperature else GREEDY
        items = [Item(prompt, _NONE) for prompt in prompts]
        found: dict[int, Reply] = {}
        for some in self._backend.replies(items, self._config.max_tokens, self._config.stop, sampling):
            found |= some
        return [found[i] for i in range(len(prompts))]

    def _prompt(self, request: str) -> np.ndarray:
        if self._chat is not None:
            return self._chat.prompt([{"role": "user", "content": request}])
        return tokenizers.prompt(self._tokenizer, request + "\n\n")


def _answer(reply: Reply) -> Answer:
    return Answer(reply.text, reply.ended, reply.input_tokens, reply.output_tokens)


def _fingerprint(config: GeneratorConfig, model: str) -> str:
    named = json.dumps([model, config.max_tokens, config.temperature, list(config.stop)])
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _seed(request: str) -> int:
    return int(hashlib.sha256(request.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16)
