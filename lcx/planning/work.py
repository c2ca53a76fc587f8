"""What a training step has to do, by arithmetic: operations, and bytes that go through memory and between devices.

Legend: T tokens of a row, N heads, K key-value heads, H head dim, D model, F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lcx.attention.parallel.context import choose_strategy
from lcx.attention.parallel.ulysses import kv_copies
from lcx.core.chips import CHIPS, Chip
from lcx.core.mask import Mask, visible_pairs
from lcx.model.architecture import share_of
from lcx.model.config import ModelConfig, is_local
from lcx.model.execution import ExecutionConfig
from lcx.model.transformer import remat_policy

WIDTH = 2
"""Bytes of a number in bfloat16, in which layers compute and weights are gathered."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A step on one device: a microbatch of `rows` rows of T = `length` tokens over a mesh (axis to size), `accumulate` times.

    `strategy`: how devices of a ring share keys; `policy`: what layers keep (`ExecutionConfig.remat`); `nested`: periods of
    layers that are recomputed together, where the policy nests; `chunk`: tokens of a row that a device has at a time where it
    walks rows in chunks; `gathers_ahead`: the keys of a whole row are gathered while other products run, as MaxText does it.
    """

    model: ModelConfig
    rows: float
    length: int
    mesh: Mapping[str, int]
    accumulate: int
    policy: str
    strategy: str
    nested: int = 1
    chunk: int | None = None
    gathers_ahead: bool = False

    @property
    def share(self) -> int:
        """Devices that share a row."""
        return self.mesh["ring"] * self.mesh["ulysses"]

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on the device."""
        return self.rows * self.length / self.share

    @property
    def at_once(self) -> float:
        """Tokens of a microbatch that the device has at a time."""
        return self.tokens if self.chunk is None else self.rows * self.chunk

    def fetched(self, kind: str) -> float:
        """Keys and values, in numbers, that a layer of a kind reads in a forward pass for one chunk of queries after another."""
        if self.chunk is None:
            return 0.0
        count, window = self.length // self.chunk, self.model.window if is_local(kind) else None
        most = count if window is None else min(count, -(-(window - 1) // self.chunk) + 1)
        visits = most * (most + 1) / 2 + (count - most) * most
        return visits * 2 * self.at_once * self.model.num_kv_heads * self.model.head_dim

    @property
    def weights(self) -> int:
        """Devices over which each weight is divided."""
        return self.mesh["fsdp"] * self.share

    @property
    def layer_weights(self) -> int:
        """Numbers in the weights of a layer, all experts' included, on a device once they are gathered."""
        m = self.model
        return (attention_weights(m) + (m.num_experts or 1) * mlp_weights(m) // self.mesh["expert"]) // self.mesh["tensor"]

    @property
    def dense(self) -> float:
        """Operations of a layer's products with weights in a forward pass of a microbatch."""
        m = self.model
        active = attention_weights(m) + (mlp_weights(m) if m.num_experts is None else m.experts_per_token * mlp_weights(m))
        return 2 * self.tokens * active / self.mesh["tensor"]

    def attention(self, kind: str) -> float:
        """Operations of the attention of a layer of a kind in a forward pass, of the pairs that its mask shows."""
        m = self.model
        pairs = visible_pairs(self.length, m.window if is_local(kind) else None)
        return 4 * self.rows * pairs * m.num_heads * m.head_dim / (self.share * self.mesh["tensor"])

    @property
    def logits(self) -> float:
        """Operations of the logits in a forward pass."""
        return 2 * self.tokens * self.model.model_dim * self.model.vocab_size / self.mesh["tensor"]

    @property
    def keys(self) -> float:
        """Bytes of the keys and values of a piece of the ring, with the heads that a device has after an exchange."""
        m, u = self.model, self.mesh["ulysses"]
        heads = m.num_kv_heads / self.mesh["tensor"]
        heads = heads * kv_copies(max(1, int(heads)), u) / u
        return 2 * self.rows * self.length / self.mesh["ring"] * heads * m.head_dim * WIDTH

    @property
    def exchanged(self) -> float:
        """Bytes that a device has of queries, keys, values and outputs, which heads are traded for in a forward pass."""
        m, u = self.model, self.mesh["ulysses"]
        if u == 1:
            return 0.0
        copies = kv_copies(max(1, m.num_kv_heads // self.mesh["tensor"]), u)
        # Outputs are in float32 until they are merged.
        heads = m.num_heads * (WIDTH + 4) + 2 * m.num_kv_heads * copies * WIDTH
        return self.tokens * heads * m.head_dim / self.mesh["tensor"]

    @property
    def redone(self) -> float:
        """Operations of a layer's products that the backward pass repeats: all but the last one, whose result nobody needs."""
        if not self.recomputes[0]:
            return 0.0
        m = self.model
        last = m.model_dim * m.mlp_dim * (1 if m.num_experts is None else m.experts_per_token)
        once = self.dense - 2 * self.tokens * last / self.mesh["tensor"]
        return once + self.dense if self.policy.startswith("nested") else once

    @property
    def recomputes(self) -> tuple[bool, bool]:
        """Whether the backward pass computes a layer's products with weights again, and its attention."""
        nests = self.policy.startswith("nested")
        return nests or self.policy in ("attention", "offload", "block"), nests or self.policy in ("dots", "block")


def work_of(
    model: ModelConfig,
    execution: ExecutionConfig,
    rows: int,
    length: int,
    accumulate: int,
    mesh: Mapping[str, int],
    chip: Chip = CHIPS["v5p"],
) -> Work:
    """The work of a step of `rows` rows of `length` tokens over a mesh of chips."""
    own = rows / accumulate / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    strategy = choose_strategy(execution.context_strategy, Mask(), "zigzag", share_of(model, length, mesh), chip).strategy
    at_once, periods = execution.at_once(length), max(1, model.num_layers // len(model.pattern))
    policy = remat_policy(execution, at_once)
    nested = execution.periods_together(periods) if policy.startswith("nested") else 1
    return Work(model, own, length, mesh, accumulate, policy, strategy, nested, at_once if at_once < length else None)


def attention_weights(model: ModelConfig) -> int:
    """Numbers in the projections of a layer's attention."""
    return model.model_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)


def mlp_weights(model: ModelConfig) -> int:
    """Numbers in a feed-forward block, one expert's if there are several."""
    return model.model_dim * model.mlp_dim * (3 if model.gated else 2)


def executed(work: Work) -> dict[str, float]:
    """Operations of a step on a device by the class of what does them, recomputation included.

    Attention's backward pass has five products where the forward pass has two; that of the logits computes them again.
    """
    attended_again, walked = work.recomputes[1], work.chunk is not None
    layers = work.model.num_layers
    attention = sum(work.attention(kind) for kind in work.model.layer_kinds)
    times = work.accumulate
    return {
        "matmul": times * (layers * ((3 + walked) * work.dense + work.redone) + 4 * work.logits),
        "attention": times * attention * (1 + walked + attended_again + 2.5),
    }


def useful(work: Work) -> float:
    """Operations of a step on a device that MFU counts: three times the forward pass."""
    attention = sum(work.attention(kind) for kind in work.model.layer_kinds)
    return 3 * work.accumulate * (work.model.num_layers * work.dense + attention + work.logits)
