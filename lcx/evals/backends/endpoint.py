"""A model behind a server that speaks OpenAI's protocol, as an evaluation's backend; its library does the retries."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.evals.base import Item, Scores
from lcx.evals.config import EndpointConfig


class EndpointBackend:
    """Answers in words from a server, greedily."""

    scheme = "none"

    def __init__(self, config: EndpointConfig) -> None:
        self._openai = library("openai", f"the endpoint {config.url}", "eval")
        self._config = config
        # Without a key the library would refuse to ask a server that needs none.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = self._openai.OpenAI(api_key=key, base_url=config.url, timeout=config.timeout, max_retries=config.retries)
        named = json.dumps([config.url, config.model, config.api])
        self.fingerprint = hashlib.sha256(named.encode()).hexdigest()[:16]

    def complete(self, items: Sequence[Item], new_tokens: int) -> Iterator[dict[int, str]]:
        """The text after each prompt, as it comes; raises `UserError` if the server does not give one in spite of all retries.

        What other requests that are open by then bring comes first.
        """
        failed = None
        with concurrent.futures.ThreadPoolExecutor(self._config.concurrency) as pool:
            asked = {pool.submit(self._ask, item, new_tokens): number for number, item in enumerate(items)}
            waiting = set(asked)
            try:
                while waiting:
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    for request in done:
                        if (error := request.exception()) is None:
                            yield {asked[request]: request.result()}
                        else:
                            failed = failed or error
                            waiting = {other for other in waiting if not other.cancel()}
            finally:
                for request in waiting:
                    request.cancel()
        if failed is not None:
            raise failed

    def loglikelihood(self, items: Sequence[Item]) -> list[Scores]:
        """Raises `UserError`: servers do not tell the probabilities of given tokens."""
        raise UserError(f"{self._config.url} gives no probabilities of given tokens; leave out tasks that need them")

    def generate(self, items: Sequence[Item], new_tokens: int) -> list[np.ndarray]:
        """Raises `UserError`: servers answer in words."""
        raise UserError(f"{self._config.url} answers in words, not in tokens; leave out tasks that need tokens")

    def _ask(self, item: Item, new_tokens: int) -> str:
        config, common = self._config, {"model": self._config.model, "max_tokens": new_tokens, "temperature": 0}
        try:
            if config.api == "chat":
                *before, last = item.turns
                roles = zip(itertools.cycle(("user", "assistant")), (*before, last + item.prefix), strict=False)
                messages = [{"role": role, "content": text} for role, text in roles]
                return self._client.chat.completions.create(messages=messages, **common).choices[0].message.content or ""
            prompt = item.prompt.tolist() if config.api == "tokens" else item.text
            return self._client.completions.create(prompt=prompt, **common).choices[0].text
        except self._openai.APITimeoutError as error:
            raise UserError(f"{config.url} gave no answer within {config.timeout:g} s; raise --timeout") from error
        except self._openai.APIStatusError as error:
            raise UserError(f"{config.url} answered {error.status_code} ({_said(error)}); {_way_out(error.status_code)}") from error
        except self._openai.APIConnectionError as error:
            raise UserError(f"{config.url} cannot be reached ({error.__cause__ or error}); is the server running?") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _way_out(status: int) -> str:
    if status in (401, 403):
        return "set OPENAI_API_KEY to a key that the server accepts"
    if status in (400, 404, 413, 422):
        return "name a model that it serves, and lengths that the model takes"
    return "the answers so far are kept; rerun the same command later"
