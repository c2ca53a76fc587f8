"""A model of lcx in EleutherAI's evaluation harness (lm_eval): log-likelihoods, rolling ones, and greedy text."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from lcx.core.console import Progress, warn
from lcx.core.errors import UserError
from lcx.core.files import write_atomically
from lcx.data.chat import chat
from lcx.data.chat.chat import Chat
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.evals.backends.local import LocalBackend
from lcx.evals.base import Item

SHORTEST = 256
"""Requests are computed at the smallest power of two that holds them, but at no smaller one than this."""


class HarnessModel(TemplateLM):
    """A model as lm_eval asks it, for contexts of up to `length` tokens; `backend` makes one for each length that is needed.

    Longer contexts lose their beginning, as with the harness's own models, after a warning. The token in front of a text without a
    context is begin-of-sequence, or else end-of-sequence, or else a line break. Requests that sample raise `UserError`.
    """

    def __init__(self, backend: Callable[[int], LocalBackend], tokenizer: Tokenizer, length: int, template: str | None) -> None:
        super().__init__()
        self._backend, self._own, self._length, self._template = backend, tokenizer, length, template

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or a line break."""
        return self._line_break if self._own.eos_id is None else self._own.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text."""
        return self.eot_token_id if self._own.bos_id is None else self._own.bos_id

    @property
    def max_length(self) -> int:
        """The most tokens that a request is computed with."""
        return self._length

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer from others."""
        return self._own.fingerprint

    @property
    def _line_break(self) -> int:
        return int(self._own.encode("\n")[-1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids: special tokens as they are spelled, with begin-of-sequence in front if the model was trained with it."""
        ids = self._own.encode_chat(string)[0].tolist()
        wanted = self._own.begins_with_bos if add_special_tokens is None else add_special_tokens
        if not wanted or self._own.bos_id is None or ids[:1] == [self._own.bos_id]:
            return ids
        return [self._own.bos_id, *ids]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text that the harness tells caches apart by."""
        return repr(self._template) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it; without a generation prompt it stops in the last message."""
        text, _ = self._chat.template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in nats: every token once, in windows of `length` that follow one another."""
        asked = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self._length, context_len=1
            )
            asked.append([utils.make_disjoint_window(window) for window in windows])
        scores = iter(self._scored([pair for windows in asked for pair in windows]))
        found = []
        for request, windows in zip(requests, asked, strict=True):
            found.append(sum(total for total, _ in itertools.islice(scores, len(windows))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first of its `until` or the end that the model sets."""
        found: dict[int, str] = {}
        groups: dict[tuple[int, int, tuple[str, ...]], list[tuple[int, Item]]] = {}
        cut = 0
        for number, (context, settings) in enumerate(request.args for request in requests):
            new_tokens, until = _generation(settings)
            if new_tokens >= self._length:
                raise UserError(
                    f"a task asks for {new_tokens:,} new tokens, which leaves no room in --length={self._length:,}; raise it"
                )
            ids, room = self.tok_encode(context), self._length - new_tokens
            cut += len(ids) > room
            item = Item(np.asarray(ids[-room:], np.int32), np.zeros(1, np.int32), text=context)
            groups.setdefault((self._size(len(item.prompt) + new_tokens), new_tokens, until), []).append((number, item))
        self._say_cut(cut)
        with Progress("lm_eval: generating", len(requests)) as bar:
            for (size, new_tokens, until), members in sorted(groups.items(), key=lambda group: group[0]):
                for texts in self._backend(size).complete([item for _, item in members], new_tokens, until):
                    bar.advance(f"{size:,} tokens", len(texts))
                    for at, text in texts.items():
                        number = members[at][0]
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the sum of its log-likelihoods, in nats, and whether it is the greedy one."""
        return self._scored([(context, continuation) for _, context, continuation in requests], [texts for texts, *_ in requests])

    def _scored(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], texts: Sequence[tuple[str, str]] = ()
    ) -> list[tuple[float, bool]]:
        """Sum of log-likelihoods and greediness of each continuation behind its context; the cache knows them by their `texts`."""
        found: dict[int, tuple[float, bool]] = {}
        groups: dict[int, list[tuple[int, Item]]] = {}
        cut = 0
        for number, (context, continuation) in enumerate(pairs):
            if not continuation:
                found[number] = (0.0, True)
                continue
            if len(continuation) > self._length:
                raise UserError(
                    f"a task scores {len(continuation):,} tokens at once, more than --length={self._length:,}; raise it"
                )
            rows = [*context, *continuation][-(self._length + 1) :]
            cut += len(rows) < len(context) + len(continuation)
            at = len(rows) - len(continuation)
            item = Item(np.asarray(rows[:at], np.int32), np.asarray(rows[at:], np.int32))
            groups.setdefault(self._size(len(rows) - 1), []).append((number, item))
        self._say_cut(cut)
        with Progress("lm_eval: scoring", len(pairs)) as bar:
            for size, members in sorted(groups.items()):
                backend = self._backend(size)
                # Continuations of one length share a program.
                members.sort(key=lambda member: len(member[1].answer))
                for part in _parts(members, backend.rows):
                    bar.advance(f"{size:,} tokens", len(part))
                    scores = backend.loglikelihood([item for _, item in part])
                    for (number, _), score in zip(part, scores, strict=True):
                        found[number] = (-float(np.sum(score.nll, dtype=np.float64)), bool(np.all(score.correct)))
                        if texts:
                            self.cache_hook.add_partial("loglikelihood", texts[number], found[number])
        return [found[number] for number in range(len(pairs))]

    def _size(self, tokens: int) -> int:
        return min(self._length, max(SHORTEST, 1 << (tokens - 1).bit_length()))

    def _say_cut(self, count: int) -> None:
        if count:
            warn(f"{count:,} requests were longer than {self._length:,} tokens and lost their beginning; raise --length to keep it")

    @functools.cached_property
    def _chat(self) -> Chat:
        return chat.load(self._own, self._template)


def run(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    metadata: Mapping[str, Any],
    include: pathlib.Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    use_chat_template: bool = False,
    answers: pathlib.Path | None = None,
) -> dict[str, Any]:
    """What lm_eval's `simple_evaluate` returns for tasks of its table, or of the YAML files in `include`.

    `metadata` is what tasks that make their own prompts ask for. `answers` is the stem of a file that keeps every answer, so that
    the same call after an interruption asks only what is missing. Raises `UserError` for tasks that cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # A fork beside JAX's threads can hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    if answers is not None:
        answers.parent.mkdir(parents=True, exist_ok=True)
    return evaluator.simple_evaluate(
        model, tasks=list(tasks), num_fewshot=shots, limit=limit, apply_chat_template=use_chat_template, bootstrap_iters=1000,
        use_cache=None if answers is None else str(answers), task_manager=_Tasks(metadata, include),
    )  # fmt: skip


def scores(results: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Task, metric, value and standard error, for every metric that has a value; RULER's tasks give -1 to lengths not asked for."""
    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, name = key.partition(",")
            if comma and isinstance(value, float) and not metric.endswith("_stderr") and not (metric.isdigit() and value == -1):
                error = found.get(f"{metric}_stderr,{name}")
                rows.append((task, metric, value, error if isinstance(error, float) else None))
    return rows


def write(results: dict[str, Any], folder: pathlib.Path, label: str) -> pathlib.Path:
    """Writes the results to `<label>.json` of a folder, whose path is returned, and a task's samples to `<label>-<task>.jsonl`."""
    for task, samples in results.get("samples", {}).items():
        lines = [json.dumps(sample, default=utils.handle_non_serializable, ensure_ascii=False) for sample in samples]
        write_atomically(folder / f"{label}-{task}.jsonl", "\n".join([*lines, ""]))
    kept = {key: value for key, value in results.items() if key != "samples"}
    return write_atomically(folder / f"{label}.json", json.dumps(kept, default=utils.handle_non_serializable, indent=1) + "\n")


class _Tasks(TaskManager):
    """Tasks by name; what goes wrong with one is said in a sentence."""

    def __init__(self, metadata: Mapping[str, Any], include: pathlib.Path | None) -> None:
        super().__init__(include_path=None if include is None else str(include), metadata=dict(metadata))

    def load(self, spec: Any) -> dict[str, Any]:
        """The tasks and groups that are named."""
        for name in spec:
            if name not in self.task_index:
                raise UserError(f"lm_eval has no task {name!r}; `lm_eval ls tasks` lists them, and --include adds your own")
        try:
            return super().load(spec)
        except (Exception, SystemExit) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"lm_eval cannot load {', '.join(spec)}: {said[0]}") from error


def _generation(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """How many new tokens a request allows, and the texts that end it."""
    wanted = normalize_gen_kwargs(dict(settings))
    if wanted.get("do_sample") or wanted.get("temperature", 0.0) > 0:
        raise UserError(f"a task samples its answers ({dict(settings)}); lcx harness answers greedily, so leave the task out")
    return int(wanted["max_gen_toks"]), tuple(text for text in wanted.get("until") or () if text)


def _parts(members: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (members[first : first + size] for first in range(0, len(members), size))
