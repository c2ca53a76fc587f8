"""The parameter table of a model: one spec per weight, layers stacked along L in layer order.

The layout depends on sizes alone, never on layer pattern, kernel or mesh. Legend: L layers, D model, N heads, K key-value
heads, H head dim, F feed-forward, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from lcx.core.param_spec import ONES, ZEROS, Init, ParamSpec, fan_in
from lcx.core.trees import Tree
from lcx.model.config import ModelConfig
from lcx.positions.scheme import Scheme


def specs(config: ModelConfig, schemes: Mapping[str, Scheme], length: int) -> Tree:
    """Nested dict of `ParamSpec`.

    `length` is the declared length that schemes with a learned table are built for. Parameters of learned schemes are stored under
    `positions/<layer kind>` and are shared by the layers of that kind.
    """
    tree: Tree = {
        "embed": {"embedding": ParamSpec((config.vocab_size, config.model_dim), ("vocab", "embed"), _embedding_init(config))},
        "layers": layer_specs(config),
        "final_norm": _norm(config, config.model_dim, stacked=False),
    }
    if not config.tied_embeddings:
        shape = (config.model_dim, config.vocab_size)
        tree["head"] = {"kernel": ParamSpec(shape, ("embed", "vocab"), fan_in(config.model_dim), inputs=1)}
    learned = {kind: schemes[kind].param_specs(config.heads, length) for kind in config.kinds}
    if learned := {kind: table for kind, table in learned.items() if table}:
        tree["positions"] = learned
    return tree


def _embedding_init(config: ModelConfig) -> Init:
    # A tied table is read as output weights, and a scaled one is multiplied by sqrt(D): both need deviation 1/sqrt(D).
    return fan_in(config.model_dim) if config.tied_embeddings or config.embedding_scale else Init("truncated", 0.5)


def layer_specs(config: ModelConfig) -> Tree:
    """The specs of the layers, stacked along L."""
    L, D, F = config.num_layers, config.model_dim, config.mlp_dim
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    num_experts = config.num_experts or 0
    # Residual branches start smaller with depth, so that the stream's variance does not grow with it (GPT-2).
    shrink = (2 * L) ** -0.5

    def linear(
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        axes: tuple[str | None, ...],
        bias: bool,
        scale: float = 1.0,
        experts: bool = False,
    ) -> Tree:
        stack, names = ((L, num_experts), (None, "experts")) if experts else ((L,), (None,))
        init = Init("truncated", fan_in(*ins).value * scale)
        tree = {"kernel": ParamSpec((*stack, *ins, *outs), (*names, *axes), init, inputs=len(ins), stacked=len(stack))}
        if bias:
            tree["bias"] = ParamSpec((L, *outs), (None, *axes[len(ins) :]), ZEROS)
        return tree

    attention = {
        "query": linear((D,), (N, H), ("embed", "heads", None), config.qkv_bias),
        "key": linear((D,), (K, H), ("embed", "kv_heads", None), config.qkv_bias),
        "value": linear((D,), (K, H), ("embed", "kv_heads", None), config.qkv_bias),
        "out": linear((N, H), (D,), ("heads", None, "embed"), config.out_bias, shrink),
    }
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        attention["query_norm"] = _norm(config, N * H if full else H, stacked=True)
        attention["key_norm"] = _norm(config, K * H if full else H, stacked=True)
    if config.sinks:
        attention["sinks"] = ParamSpec((L, N), (None, "heads"), ZEROS)
    many = num_experts > 0
    mlp = {
        "up": linear((D,), (F,), ("embed", "mlp"), config.mlp_bias, experts=many),
        "down": linear((F,), (D,), ("mlp", "embed"), config.mlp_bias, shrink, experts=many),
    }
    if config.gated:
        mlp["gate"] = linear((D,), (F,), ("embed", "mlp"), config.mlp_bias, experts=many)
    if many:
        mlp["router"] = linear((D,), (num_experts,), ("embed", None), False)
    tree = {"attention": attention, "mlp": mlp}
    for name, wanted in (("pre", config.pre_norm), ("post", config.post_norm)):
        if wanted:
            tree[f"{name}_attention_norm"] = _norm(config, D, stacked=True)
            tree[f"{name}_mlp_norm"] = _norm(config, D, stacked=True)
    return tree


def _norm(config: ModelConfig, size: int, *, stacked: bool) -> Tree:
    init = ONES if not config.norm_offset else Init("constant", 1.0 - config.norm_offset)
    shape = (config.num_layers, size) if stacked else (size,)
    return {"scale": ParamSpec(shape, (None,) * len(shape), init)}
