"""The configuration of a decoder-only transformer, and the assignment of positional schemes to its layers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lcx.core.configs import positive
from lcx.core.errors import UserError
from lcx.positions.scheme import Heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder-only transformer; the defaults are Llama's. How it is computed: `ExecutionConfig`.

    `pattern` names the kind of each layer and repeats over the depth. A kind whose name starts with `local` has a sliding window
    of `window` tokens. Positional schemes are chosen per kind, outside this class.
    """

    vocab_size: int = 256
    model_dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    pattern: tuple[str, ...] = ("global",)
    window: int | None = None
    # feed-forward
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"] = "silu"
    gated: bool = True
    mlp_bias: bool = False
    # mixture of experts
    num_experts: int | None = None
    """Number of feed-forward blocks of `mlp_dim` in each layer, of which a router picks some per token. None: one, no router."""
    experts_per_token: int = 2
    normalize_expert_weights: bool = True
    """Divide a token's expert weights, which come from the router's softmax, by their sum (Mixtral; `norm_topk_prob` of Qwen 3)."""
    router_aux_weight: float = 0.0
    """Scales the load-balancing loss (`experts.balance_loss`) in training; 0: not computed."""
    # norms
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Added to every norm scale, which then starts at 1 - norm_offset (Gemma: 1)."""
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of queries and keys: over each head (Qwen 3, Gemma 3) or over all heads at once (OLMo 2)."""
    # attention
    qkv_bias: bool = False
    out_bias: bool = False
    query_scale: float | None = None
    """Multiplies the scores; None means head_dim ** -0.5."""
    attention_softcap: float | None = None
    sinks: bool = False
    """One learned logit per head that takes part in the softmax without a value."""
    prefix_attention: bool = False
    """Keys that a batch marks by `is_prefix` are seen by their whole document, before them too; no loader marks any."""
    # embedding and output
    tied_embeddings: bool = False
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(model_dim), rounded in the compute dtype (Gemma)."""
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "window")
        positive("model", **{name: getattr(self, name) for name in sizes})
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise UserError(f"model.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; use one of {divisors}")
        self._check_experts()
        if not self.pattern:
            raise UserError("model.pattern=() needs at least one layer kind, for example ('global',)")
        if any(is_local(kind) for kind in self.pattern) and self.window is None:
            raise UserError(f"model.pattern={self.pattern} has local layers; set model.window to a number of tokens")

    def _check_experts(self) -> None:
        positive("model", num_experts=self.num_experts, experts_per_token=self.experts_per_token)
        if not self.router_aux_weight >= 0:
            raise UserError(f"model.router_aux_weight={self.router_aux_weight!r} must not be negative")
        if self.num_experts is None:
            if self.router_aux_weight:
                raise UserError(f"model.router_aux_weight={self.router_aux_weight} balances experts; set model.num_experts too")
            return
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} is above model.num_experts={self.num_experts}; lower it"
            )
        if self.mlp_bias:
            raise UserError("model.mlp_bias=True is not supported with model.num_experts: experts have no biases; set it to False")

    @property
    def heads(self) -> Heads:
        """The sizes that positional schemes are built from."""
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim, self.model_dim)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layer kinds in use, in order of first appearance."""
        return tuple(dict.fromkeys(self.pattern[: self.num_layers]))

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))


def is_local(kind: str) -> bool:
    """True for layer kinds with a sliding window."""
    return kind.startswith("local")
