"""A model behind a server that speaks OpenAI's protocol, as an evaluation's backend; its library does the retries."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lcx.core.errors import UserError
from lcx.core.extras import library
from lcx.evals.base import Item, Reply, Scores
from lcx.evals.config import EndpointConfig


class EndpointBackend:
    """Answers in words from a server."""

    scheme = "none"

    def __init__(self, config: EndpointConfig) -> None:
        self._openai = library("openai", f"the endpoint {config.url}", "eval")
        self._config = config
        # Without a key the library would refuse to ask a server that needs none.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = self._openai.OpenAI(api_key=key, base_url=config.url, timeout=config.timeout, max_retries=config.retries)
        named = json.dumps([config.url, config.model, config.api])
        self._reached = False
        self.fingerprint = hashlib.sha256(named.encode()).hexdigest()[:16]

    def complete(self, items: Sequence[Item], new_tokens: int) -> Iterator[dict[int, str]]:
        """The text after each prompt, greedily, as it comes; raises what `replies` does."""
        for found in self.replies(items, new_tokens):
            yield {number: reply.text for number, reply in found.items()}

    def replies(
        self, items: Sequence[Item], new_tokens: int, temperature: float = 0.0, stop: Sequence[str] = ()
    ) -> Iterator[dict[int, Reply]]:
        """What the server says to each prompt, as it comes; raises `UserError` if it does not answer in spite of all retries.

        A server that is not there at the start is not waited for. What other requests that are open by then bring comes first. At a
        `temperature` each request has a seed, which depends on its words; not every server heeds it.
        """
        self._reach()
        failed, more = None, {"temperature": temperature, **({"stop": list(stop)} if stop else {})}
        with concurrent.futures.ThreadPoolExecutor(self._config.concurrency) as pool:
            asked = {pool.submit(self._ask, item, new_tokens, more): number for number, item in enumerate(items)}
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

    def _reach(self) -> None:
        """Raises `UserError` if nothing listens at the address; a server that is there may answer what it likes."""
        if self._reached:
            return
        try:
            self._client.with_options(max_retries=0, timeout=10).models.list()
        except self._openai.APITimeoutError:
            pass
        except self._openai.APIConnectionError as error:
            if type(error.__cause__).__name__ == "ConnectError":
                raise self._unreachable(error) from error
        except self._openai.OpenAIError:
            pass
        self._reached = True

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(f"{self._config.url} cannot be reached ({error.__cause__ or error}); is the server running?")

    def loglikelihood(self, items: Sequence[Item]) -> list[Scores]:
        """Raises `UserError`: servers do not tell the probabilities of given tokens."""
        raise UserError(f"{self._config.url} gives no probabilities of given tokens; leave out tasks that need them")

    def generate(self, items: Sequence[Item], new_tokens: int) -> list[np.ndarray]:
        """Raises `UserError`: servers answer in words."""
        raise UserError(f"{self._config.url} answers in words, not in tokens; leave out tasks that need tokens")

    def _ask(self, item: Item, new_tokens: int, more: dict[str, Any]) -> Reply:
        config, common = self._config, {"model": self._config.model, "max_tokens": new_tokens, **more}
        if more["temperature"]:
            common["seed"] = int(hashlib.sha256(item.text.encode("utf-8", "surrogatepass")).hexdigest()[:7], 16)
        try:
            if config.api == "chat":
                *before, last = item.turns
                roles = zip(itertools.cycle(("user", "assistant")), (*before, last + item.prefix), strict=False)
                messages = [{"role": role, "content": text} for role, text in roles]
                found = self._client.chat.completions.create(messages=messages, **common)
                return _reply(found, found.choices[0], found.choices[0].message.content or "")
            prompt = item.prompt.tolist() if config.api == "tokens" else item.text
            found = self._client.completions.create(prompt=prompt, **common)
            return _reply(found, found.choices[0], found.choices[0].text)
        except self._openai.APITimeoutError as error:
            raise UserError(
                f"{config.url} gave no answer within {config.timeout:g} s; raise --timeout, or timeout in a config"
            ) from error
        except self._openai.APIStatusError as error:
            raise UserError(f"{config.url} answered {error.status_code} ({_said(error)}); {_way_out(error.status_code)}") from error
        except self._openai.APIConnectionError as error:
            raise self._unreachable(error) from error
        except (self._openai.APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{config.url} does not answer as OpenAI's protocol says ({_said(error)}); check the address"
            ) from error


def _reply(found: Any, choice: Any, text: str) -> Reply:
    used = getattr(found, "usage", None)
    counts = (getattr(used, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(text, getattr(choice, "finish_reason", None) or "stop", *counts)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _way_out(status: int) -> str:
    if status in (401, 403):
        return "set OPENAI_API_KEY to a key that the server accepts"
    if status in (400, 404, 413, 422):
        return "name a model that it serves, and lengths that the model takes"
    return "the answers so far are kept; rerun the same command later"
