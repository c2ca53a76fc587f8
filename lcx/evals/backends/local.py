"""A model of lcx as an evaluation's backend: one compiled program per shape, whatever the frequencies.

Legend: B rows in one forward pass, T tokens, A answer tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lcx.attention.parallel.sequence_layout import arrange, restore
from lcx.core.batch import Batch
from lcx.core.mesh import context_size, mesh_of
from lcx.core.numbers import round_up
from lcx.core.trees import Tree
from lcx.data.tokenizers.stream import Stream
from lcx.data.tokenizers.tokenizers import Tokenizer
from lcx.evals.backends.branches import branches
from lcx.evals.base import Item, Reply, Scores
from lcx.model.architecture import Architecture, build_architecture, row_layout
from lcx.model.config import ModelConfig
from lcx.model.decode import CHUNK, Prefix, generate, prefill
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import token_losses
from lcx.model.recurrent import hidden_states
from lcx.model.sampling import GREEDY, Sampling
from lcx.positions.scheme import Scheme


@functools.partial(jax.jit, static_argnames=("arch", "count"))
def score(
    params: Tree, buffers: Tree, tokens: jax.Array, first: jax.Array, arch: Architecture, count: int
) -> tuple[jax.Array, jax.Array]:
    """Loss and match of `count` predictions of rows `[B, T + 1]`, from number `first` `[B]` on; logits are made for these alone.

    Frequencies are in `buffers`, so a theta ladder and a zero-shot comparison of schemes of one form share the program. On a mesh
    that is set rows are split over its context as in training, and logits are made for all tokens.
    """

    def chosen(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, count))(x, first)

    batch = Batch.from_tokens(tokens)
    mesh = jax.sharding.get_abstract_mesh()
    if context_size() == 1:
        states = chosen(hidden_states(params, buffers, arch, batch))
        losses = token_losses(params, states, chosen(batch.targets), arch)
        return losses.nll, losses.correct
    ring, layout = mesh.shape["ring"], row_layout(arch.config, arch.execution, batch.tokens.shape[1], mesh)
    batch = arrange(batch, layout, ring).replace(layout=layout)
    losses = token_losses(params, hidden_states(params, buffers, arch, batch), batch.targets, arch)
    nll, correct = restore((losses.nll, losses.correct), layout, ring)
    return chosen(nll), chosen(correct)


class LocalBackend:
    """A model of lcx under `schemes` (by layer kind), laid out for `length` tokens, on the mesh that its weights are placed on.

    At most `tokens_per_forward` tokens, but at least one row, are processed at a time. Answers in words take a `tokenizer`; they
    end with its end-of-sequence token or another of `stop_ids`. With `share_prefixes` what their prompts have in common is
    prefilled once.
    """

    def __init__(
        self,
        params: Tree,
        config: ModelConfig,
        execution: ExecutionConfig,
        schemes: Mapping[str, Scheme],
        length: int,
        tokens_per_forward: int = 1 << 14,
        tokenizer: Tokenizer | None = None,
        stop_ids: Sequence[int] = (),
        scheme: str = "none",
        share_prefixes: bool = True,
    ) -> None:
        self.scheme, self._share_prefixes = scheme, share_prefixes
        self._params, self._length, self._tokenizer, self._stop_ids = params, length, tokenizer, tuple(stop_ids)
        self.rows = max(1, tokens_per_forward // length)
        """Rows in one forward pass."""
        self._compiled: set[int] = set()
        with mesh_of(params):
            self._context = context_size()
        self._arch, self._buffers = build_architecture(config, execution, schemes, length)

    def loglikelihood(self, items: Sequence[Item]) -> list[Scores]:
        """Scores `[A]` of each item's answer.

        Rows are padded behind their end, which no token before it sees, so that all passes at a length, for whatever task, have
        one shape and share one program; a group that is not full is filled up with copies of its first row.
        """
        found = []
        # With a small vocabulary the logits of all tokens cost less than compiling a program for each number of them.
        whole = self._arch.config.vocab_size <= 1024
        longest = 1 << (max((len(item.answer) for item in items), default=1) - 1).bit_length()
        count = self._length if whole else min(self._length, longest)
        for group in self._groups(items):
            rows, starts = np.zeros((self.rows, self._length + 1), np.int32), np.zeros(self.rows, np.int32)
            for i, item in enumerate(group):
                begun = len(item.prompt)
                rows[i, :begun], rows[i, begun : begun + len(item.answer)] = item.prompt, item.answer
                starts[i] = min(begun - 1, self._length - count)
            rows[len(group) :] = rows[0]
            scores = self._score(rows, starts, count)
            for i, item in enumerate(group):
                first = len(item.prompt) - 1 - starts[i]
                found.append(Scores(*(x[i, first : first + len(item.answer)] for x in scores)))
        return found

    def generate(self, items: Sequence[Item], new_tokens: int) -> list[np.ndarray]:
        """`new_tokens` tokens after each prompt, greedily."""
        out: list[np.ndarray] = []
        with mesh_of(self._params):
            for group in self._groups(items):
                out += list(generate(self._params, self._buffers, self._arch, [item.prompt for item in group], new_tokens))
        return out

    def complete(self, items: Sequence[Item], new_tokens: int, until: Sequence[str] = ()) -> Iterator[dict[int, str]]:
        """The text after each prompt, greedily, without the token that ends it, by number of the item, as it comes.

        A text ends before the first of `until` in it, too.
        """
        for found in self.replies(items, new_tokens, until):
            yield {number: reply.text for number, reply in found.items()}

    def replies(
        self, items: Sequence[Item], new_tokens: int, until: Sequence[str] = (), sampling: Sampling = GREEDY
    ) -> Iterator[dict[int, Reply]]:
        """As `complete`, with how each text ended and its tokens.

        What is drawn, unless greedily, depends on a row's place among those that are answered side by side.
        """
        prompts = [item.prompt for item in items]
        chunk = round_up(min(CHUNK, max(64, self._length // 8)), self._context)
        # A prefix and what follows it are padded to whole chunks each.
        slots = round_up(self._length, chunk) + 2 * chunk
        for shared, numbers in branches(prompts, max(2 * chunk, self._length // 8) if self._share_prefixes else self._length):
            prefix = None
            if shared:
                with mesh_of(self._params):
                    beginning = prompts[numbers[0]][:shared]
                    prefix = prefill(self._params, self._buffers, self._arch, beginning, slots=slots, chunk=chunk)
            while numbers:
                count = self._side_by_side([len(prompts[i]) - shared for i in numbers[: self.rows]], chunk if shared else None)
                here, numbers = numbers[:count], numbers[count:]
                found = self._continued([prompts[i] for i in here], new_tokens, slots, chunk, prefix, until, sampling)
                yield dict(zip(here, found, strict=True))

    def _side_by_side(self, lengths: Sequence[int], chunk: int | None) -> int:
        """How many of the prompts, longest first, are answered together: behind a prefix, those padded by up to a `chunk`."""
        if chunk is None:
            return len(lengths)
        whole = round_up(lengths[0], self._width(lengths[0], chunk))
        return sum(whole - length <= chunk for length in lengths)

    def _width(self, tokens: int, chunk: int) -> int:
        """The chunk for what follows a prefix: few sizes, so that there are few programs."""
        return min(chunk, round_up(max(16, 1 << (tokens - 1).bit_length()), self._context))

    def _continued(
        self, prompts: Sequence[np.ndarray], new_tokens: int, slots: int, chunk: int, prefix: Prefix | None, until: Sequence[str],
        sampling: Sampling,
    ) -> list[Reply]:  # fmt: skip
        """What follows prompts that are answered side by side."""
        assert self._tokenizer is not None
        own = () if self._tokenizer.eos_id is None else (self._tokenizer.eos_id,)
        stops, shared = (*own, *self._stop_ids), 0 if prefix is None else len(prefix.tokens)
        # Calls with the same number of rows share their programs; up to as many rows again are filled up for that.
        known = [rows for rows in self._compiled if len(prompts) <= rows <= 2 * len(prompts)]
        rows = min(known, default=len(prompts))
        self._compiled.add(rows)
        fill = [prompts[0][: shared + 1]] * (rows - len(prompts))
        with mesh_of(self._params):
            found = generate(
                self._params, self._buffers, self._arch, [*prompts, *fill], new_tokens,
                sampling=sampling, stop_ids=stops, slots=slots, prefix=prefix,
                chunk=self._width(max(map(len, prompts)) - shared, chunk) if shared else chunk,
                on_token=_Ends(len(prompts), until, self._tokenizer),
            )  # fmt: skip
        return [self._reply(prompt, row, stops, until) for prompt, row in zip(prompts, found, strict=False)]

    def _reply(self, prompt: np.ndarray, row: np.ndarray, stops: Sequence[int], until: Sequence[str]) -> Reply:
        """A row of new tokens in words."""
        assert self._tokenizer is not None
        ended = len(row) > 0 and row[-1] in stops
        text = self._tokenizer.decode(row[:-1] if ended else row)
        at = min((at for stop in until if (at := text.find(stop)) >= 0), default=None)
        return Reply(text[:at], "length" if at is None and not ended else "stop", len(prompt), len(row))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the weights, the model and its positional schemes, and the type that they are computed in."""
        sums, dtype = jax.tree.leaves(_sums((self._params, self._buffers))), self._arch.execution.compute_dtype
        # The loss that balances experts is one of training.
        model = dataclasses.replace(self._arch.config, router_aux_weight=0.0)
        named = "".join([told(model), told(self._arch.schemes), "" if dtype == "float32" else dtype])
        return hashlib.sha256(np.asarray(sums, np.uint32).tobytes() + named.encode()).hexdigest()[:16]

    def _groups(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[first : first + self.rows] for first in range(0, len(items), self.rows)]

    def _score(self, rows: np.ndarray, first: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
        """Loss and match `[B, count]` of predictions of rows `[B, T + 1]`, from number `first` `[B]` on."""
        with mesh_of(self._params):
            # Any layout can deal such a length.
            fill = -(rows.shape[1] - 1) % (2 * context_size()) if context_size() > 1 else 0
            rows = jnp.asarray(np.pad(rows, ((0, 0), (0, fill))))
            return tuple(fetch(x) for x in score(self._params, self._buffers, rows, jnp.asarray(first), self._arch, count))


class _Ends:
    """For `generate`: ends rows from number `rows` on, which are there for their shape alone, and those whose text holds an end."""

    def __init__(self, rows: int, until: Sequence[str], tokenizer: Tokenizer) -> None:
        self._rows = rows
        self._streams = [Stream(tokenizer, until) for _ in range(rows)] if until else []

    def __call__(self, step: int, new: Mapping[int, int]) -> list[int]:
        ended = [row for row in new if row >= self._rows]
        for row, token in new.items() if self._streams else ():
            if row < self._rows:
                self._streams[row].add(token)
                if self._streams[row].stopped:
                    ended.append(row)
        return ended


def told(value: Any) -> str:
    """A value as text, the fields of dataclasses without those at their defaults, so that one that is added changes nothing."""
    if isinstance(value, tuple):
        return f"({', '.join(map(told, value))})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    given = (f"{field.name}={told(of)}" for field, of in fields if of != field.default)
    return f"{type(value).__name__}({', '.join(given)})"


@jax.jit
def _sums(tree: Tree) -> Tree:
    """For every array a number that changes with its bits and their places; no array is gathered for it.

    A sum of integers, which wraps around, is the same in every order, so on every machine, mesh and number of cores.
    """

    def of(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        # Eight bytes become two words, along one more axis.
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
        for axis in range(words.ndim):
            words = _mixed(words) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        return jnp.sum(_mixed(words), dtype=jnp.uint32)

    return jax.tree.map(of, tree)


def _mixed(words: jax.Array) -> jax.Array:
    """Numbers of 32 bits, one for each, that look unlike where these look alike (the last steps of MurmurHash3)."""
    words = (words ^ words >> 16) * jnp.uint32(0x85EBCA6B)
    words = (words ^ words >> 13) * jnp.uint32(0xC2B2AE35)
    return words ^ words >> 16


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, gathered from other hosts where they hold parts of it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
