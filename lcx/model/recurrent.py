"""Training on rows of any length in the memory of one chunk of them: forward and backward walk a row chunk by chunk.

The first walk computes the keys and values of all layers, from the first chunk to the last. The second goes from the last chunk to
the first: it computes a chunk again, its loss, and the gradients of the parameters and of the keys and values of this and all
earlier chunks, which collect them until their own turn comes. Attention is causal, so that by then all contributions are there:
the gradients are those of whole rows, at the price of one more forward pass. What grows with the row are its tokens, keys, values,
and the gradients of these (`attention.chunks`).

Legend: B batch, T tokens, n chunks of a row, C tokens of a chunk, K KV heads, H head dim, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lcx.attention.chunks import Chunk, KeyChunks, RowChunks, attend_to_chunks
from lcx.core.batch import Batch, cut_tokens, join_tokens
from lcx.core.errors import UserError
from lcx.core.trees import Tree
from lcx.model import transformer
from lcx.model.architecture import Architecture
from lcx.model.norm import rms_norm
from lcx.model.transformer import LayerInputs, cast_params, embed, scan_layers

Objective = Callable[[Tree, jax.Array, Batch], tuple[jax.Array, Tree]]
"""`(params, states_BCD, batch) -> (objective, sums)` of a chunk's final hidden states; both add up over chunks."""


def in_several(arch: Architecture, length: int) -> bool:
    """Whether rows of `length` tokens are walked in chunks (`execution.recurrent_chunk`); shorter ones are a single one."""
    return arch.execution.at_once(length) < length


def sums_and_gradients(
    objective: Objective, whole: Callable[[Tree], Tree], trained: Tree, buffers: Mapping[str, Any], arch: Architecture, batch: Batch
) -> tuple[Tree, Tree]:
    """The sums of `objective` over whole rows, and the float32 gradients of its first result with respect to `trained`.

    `whole` makes all parameters of those that are trained. T must be a multiple of `execution.recurrent_chunk`. Raises `UserError`
    for rows with keys that earlier queries see.
    """
    walk = _Walk.build(arch, buffers, batch)
    params = whole(trained)
    # Without the states, so that nothing but keys and values is computed and kept.
    keys = jax.lax.fori_loop(
        0, walk.count, lambda i, keys: walk.collect(params, keys, i)[0], walk.empty(arch.execution.compute_dtype)
    )

    def back(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        gradients, sums, pending = carry

        def chunk(trained: Tree, stand_in: Tree) -> tuple[tuple[jax.Array, Tree], Tree]:
            params = whole(trained)
            states, stand_in = walk.states(params, number, functools.partial(walk.look_back, keys), stand_in)
            total, sums = objective(params, states, walk.piece(number))
            return (total, stand_in), sums

        # Only the cotangents of the stand-in mean anything: the gradients of keys and values so far.
        (total, _), pull, own = jax.vjp(chunk, trained, walk.empty(jnp.float32), has_aux=True)
        found, pending = pull((jnp.ones_like(total), pending))
        return (jax.tree.map(jnp.add, gradients, found), jax.tree.map(jnp.add, sums, own), pending), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    like = jax.eval_shape(lambda: objective(whole(trained), walk.blank_states(), walk.piece(jnp.int32(0)))[1])
    start = (zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), walk.empty(jnp.float32))
    (gradients, sums, _), _ = jax.lax.scan(back, start, jnp.arange(walk.count), reverse=True)
    return sums, gradients


def hidden_states(params: Tree, buffers: Mapping[str, Any], arch: Architecture, batch: Batch) -> jax.Array:
    """As `transformer.hidden_states`, without the experts' balance: on one device, rows longer than `execution.recurrent_chunk` are
    walked chunk by chunk.

    Those are not differentiable so. T need not be a multiple of the chunk.
    """
    length, mesh = batch.tokens.shape[1], jax.sharding.get_abstract_mesh()
    if not in_several(arch, length) or mesh.size > 1:
        return transformer.hidden_states(params, buffers, arch, batch)[0]
    missing = -length % (arch.execution.recurrent_chunk or 1)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing))), dataclasses.replace(batch, row_parts=None))
    walk = _Walk.build(arch, buffers, padded)
    _, states = jax.lax.scan(
        functools.partial(walk.collect, params), walk.empty(arch.execution.compute_dtype), jnp.arange(walk.count)
    )
    return join_tokens(states)[:, :length]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Rows cut into chunks: `tokens` is their batch as `[n, B, C]`, `row_parts` as it was, and `rows` has what each kind of layer
    needs of them."""

    arch: Architecture
    buffers: Mapping[str, Any]
    tokens: Batch
    row_parts: jax.Array | None
    rows: dict[str, RowChunks]

    @classmethod
    def build(cls, arch: Architecture, buffers: Mapping[str, Any], batch: Batch) -> _Walk:
        """Of a batch whose rows are in their own order."""
        if batch.is_prefix is not None:
            raise UserError(
                "rows with prefixes that earlier tokens see cannot be computed in chunks; leave execution.recurrent_chunk out"
            )
        chunk = arch.execution.recurrent_chunk or batch.tokens.shape[1]
        rows = {kind: RowChunks.build(batch.index, chunk, buffers[kind].get("rotations", {})) for kind in arch.config.kinds}
        tokens = cut_tokens(dataclasses.replace(batch, row_parts=None), batch.tokens.shape[1] // chunk)
        return cls(arch, buffers, tokens, batch.row_parts, rows)

    @property
    def count(self) -> int:
        """The number of chunks."""
        return self.tokens.tokens.shape[0]

    def piece(self, number: jax.Array) -> Batch:
        """A chunk of the batch."""
        return jax.tree.map(lambda x: x[number], self.tokens).replace(row_parts=self.row_parts)

    def blank_states(self) -> jax.Array:
        """Zeros like the hidden states of a chunk."""
        return jnp.zeros((*self.tokens.tokens.shape[1:], self.arch.config.model_dim), self.arch.execution.compute_dtype)

    def empty(self, dtype: Any) -> dict[str, KeyChunks]:
        """Room for the keys and values of all layers, by kind."""
        config = self.arch.config
        shape = (*self.tokens.tokens.shape[1:], config.num_kv_heads, config.head_dim)
        return {kind: KeyChunks.empty(config.layer_kinds.count(kind), self.count, shape, dtype) for kind in config.kinds}

    def states(self, params: Tree, number: jax.Array, attention: Callable[..., tuple], state: Tree) -> tuple[jax.Array, Tree]:
        """Final hidden states `[B, C, D]` of a chunk, and `state` after all layers.

        `attention(attend, kind, nth, state, q, k, v)` gives a layer's output and the state after it, by `attend(q, k, v, keys=...,
        gradients=..., nth=...)`.
        """
        params, arch, batch = cast_params(params, self.arch), self.arch, self.piece(number)

        def attend_in(kind: str) -> Callable[..., tuple]:
            spec, row = arch.attention(kind), self.rows[kind]
            inputs = LayerInputs.build(arch, kind, params, self.buffers, batch.index)
            return functools.partial(
                attend_to_chunks, spec, row=row, chunk=Chunk.build(spec, row, number), q_tables=inputs.tables,
                bias_params=inputs.bias, query_scale=inputs.query_scale,
            )  # fmt: skip

        attends = {kind: attend_in(kind) for kind in arch.config.kinds}

        def layer_attention(
            kind: str, nth: jax.Array | int, layer: Tree, state: Tree, q: jax.Array, k: jax.Array, v: jax.Array
        ) -> tuple[jax.Array, Tree]:
            attend = functools.partial(attends[kind], nth=nth, sinks=layer["attention"].get("sinks"))
            return attention(attend, kind, nth, state, q, k, v)

        x = embed(params, self.buffers, arch, batch.tokens, batch.positions)
        x, state, _ = scan_layers(params["layers"], x, arch, layer_attention, state)
        return rms_norm(params["final_norm"], x, arch.config), state

    def collect(self, params: Tree, keys: dict[str, KeyChunks], number: jax.Array) -> tuple[dict[str, KeyChunks], jax.Array]:
        """The keys and values so far with those of a chunk, and its hidden states."""

        def attention(attend, kind, nth, state, q, k, v):
            own = state[kind].write(nth, number, jnp.stack([k, v]))
            return attend(q, k, v, keys=own, gradients=None)[0], {**state, kind: own}

        states, keys = self.states(params, number, attention, keys)
        return keys, states

    @staticmethod
    def look_back(keys: dict[str, KeyChunks], attend: Callable, kind: str, nth: Any, state: Tree, q: Any, k: Any, v: Any) -> tuple:
        """A layer's output by keys and values that have been collected."""
        out, own = attend(q, k, v, keys=keys[kind], gradients=state[kind])
        return out, {**state, kind: own}
