"""The model families that lcx reads and writes in Hugging Face's format: one row each, used in both directions.

A row says which keys of config.json the family has, the defaults of transformers for missing ones, which options of
`ModelConfig` the family fixes, and the names of its tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
"""config.json with the family's defaults filled in."""

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers/attention/query": "self_attn.q_proj",
    "layers/attention/key": "self_attn.k_proj",
    "layers/attention/value": "self_attn.v_proj",
    "layers/attention/out": "self_attn.o_proj",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
    "layers/pre_attention_norm": "input_layernorm",
    "layers/pre_mlp_norm": "post_attention_layernorm",
}
"""Path of a parameter without its last part -> Hugging Face's module; without `model.layers.<n>.` for a layer's modules."""

_QK_NORMS = {"layers/attention/query_norm": "self_attn.q_norm", "layers/attention/key_norm": "self_attn.k_norm"}
_POST_NORMS = {
    "layers/post_attention_norm": "post_attention_layernorm",
    "layers/post_mlp_norm": "post_feedforward_layernorm",
}
_GEMMA_NAMES = {**LLAMA_NAMES, **_POST_NORMS, "layers/pre_mlp_norm": "pre_feedforward_layernorm"}
_MIXTRAL_NAMES = {
    **LLAMA_NAMES,
    "layers/mlp/router": "block_sparse_moe.gate",
    "layers/mlp/gate": "block_sparse_moe.experts.{expert}.w1",
    "layers/mlp/up": "block_sparse_moe.experts.{expert}.w3",
    "layers/mlp/down": "block_sparse_moe.experts.{expert}.w2",
}
_QWEN3_MOE_NAMES = {
    **LLAMA_NAMES,
    **_QK_NORMS,
    "layers/mlp/router": "mlp.gate",
    "layers/mlp/gate": "mlp.experts.{expert}.gate_proj",
    "layers/mlp/up": "mlp.experts.{expert}.up_proj",
    "layers/mlp/down": "mlp.experts.{expert}.down_proj",
}
_PHI3_NAMES = {
    **LLAMA_NAMES,
    "layers/attention/query": "self_attn.qkv_proj",
    "layers/attention/key": "self_attn.qkv_proj",
    "layers/attention/value": "self_attn.qkv_proj",
    "layers/mlp/gate": "mlp.gate_up_proj",
    "layers/mlp/up": "mlp.gate_up_proj",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table.

    `optional` maps the keys of config.json that the family has besides `REQUIRED` to the defaults that transformers uses if they
    are missing. `kinds` returns the kind of every layer. `options` are fields of `ModelConfig` that the family fixes. If several
    parameters have the same name in `names`, their tensor is the concatenation in the order of the table; `{expert}` in a name is
    replaced by the expert's number.
    """

    architecture: str
    optional: Mapping[str, Any]
    kinds: Callable[[Values], list[str]]
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Fields of `ModelConfig` whose key differs from that of other families."""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Alternative names of keys, which are also written."""
    theta: float = 10000.0
    """The theta that transformers uses if a config has none."""
    nested: bool = False
    """Full and sliding layers have separate rotary embeddings."""
    scales_queries: bool = False
    """Queries are multiplied by a factor that grows with their position, `llama_4_scaling_beta`; others ignore that key."""
    with_scaled_queries: str | None = None
    """The family that is the same but for such a factor."""


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Keys that every config must have: sizes."""

ROPE_KEYS = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor",
    "original_max_position_embeddings", "llama_4_scaling",
)  # fmt: skip
"""Keys about rotary positions, transformers 5's and the older ones; `positions.hf` reads them."""

NO_EFFECT = frozenset((
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "auto_map",
    "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "resid_pdrop", "embd_pdrop", "pretraining_tp",
    "name_or_path", "_name_or_path", "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states",
    "return_dict", "cache_implementation", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "router_aux_loss_coef", "tokenizer_class", "unsloth_version", "unsloth_fixed", "neftune_noise_alpha", "output_router_logits",
    "router_jitter_noise",
))  # fmt: skip
"""Keys that do not change what a model computes in evaluation, or whose information lcx takes from elsewhere."""

LENGTHS = ("max_sequence_length", "model_max_length", "seq_length", "max_seq_len", "tokenizer_model_max_length")
"""What a length was called by others, besides max_position_embeddings, which lcx reads alone."""

BOOKKEEPING = frozenset((
    # transformers' own, of training, of outputs, and of generation, which generation_config.json has nowadays.
    "torchscript", "use_bfloat16", "tf_legacy_loss", "tie_encoder_decoder", "cross_attention_hidden_size", "finetuning_task",
    "task_specific_params", "prefix", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "is_llama_config", "gradient_checkpointing", "use_flash_attention", "use_flash_attn", "use_sdpa",
    "flash_attn", "classifier_dropout", "hidden_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "ffn_dropout",
    *LENGTHS,
    # Tools that trained or converted the model.
    "axolotl_version", "license", "custom_pipelines",
    # Written for models without windows by transformers, which reads layer_types.
    "max_window_layers",
))  # fmt: skip
"""More keys that change nothing, which a line names when a model is read. So are keys with an underscore in front, ids of tokens
and keys of unsloth's."""


def changes_nothing(key: str) -> bool:
    """Whether a key that no family knows is bookkeeping of transformers or of another tool."""
    ids = ("_token_id", "_token_ids", "_token_index")
    return key in BOOKKEEPING or key.startswith(("_", "unsloth_")) or key.endswith(ids)


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "use_bidirectional_attention": (None, False),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (1,),
    "pruned_heads": (None, {}),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
}
"""Keys for which lcx supports only these values."""


def _all_alike(values: Values) -> list[str]:
    kind = "global" if values["sliding_window"] is None else "local"
    return [kind] * values["num_hidden_layers"]


def _always_global(values: Values) -> list[str]:
    return ["global"] * values["num_hidden_layers"]


def _by_type(values: Values, default: Sequence[str]) -> list[str]:
    types = values["layer_types"] or default
    return ["local" if kind == "sliding_attention" else "global" for kind in types]


def _all_alike_if_used(values: Values) -> list[str]:
    return _all_alike(values if values["use_sliding_window"] else {**values, "sliding_window": None})


def _qwen(values: Values) -> list[str]:
    windowed = values["use_sliding_window"] and values["sliding_window"] is not None
    first = values["max_window_layers"] if windowed else values["num_hidden_layers"]
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(values["num_hidden_layers"])]
    return _by_type(values, default)


def _gemma2(values: Values) -> list[str]:
    return _by_type(values, [("sliding_attention", "full_attention")[i % 2] for i in range(values["num_hidden_layers"])])


def _gemma3(values: Values) -> list[str]:
    every = values["_sliding_window_pattern"] or values["sliding_window_pattern"] or 6
    default = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(values["num_hidden_layers"])]
    return _by_type(values, default)


def _smollm3(values: Values) -> list[str]:
    layers, every = range(values["num_hidden_layers"]), values["no_rope_layer_interval"]
    rotary = values["no_rope_layers"] or [int((i + 1) % every != 0) for i in layers]
    windowed = values["use_sliding_window"] and values["sliding_window"] is not None
    default = ["sliding_attention" if windowed and not rotary[i] else "full_attention" for i in layers]
    suffix = {"local": "local_nope", "global": "nope"}
    return [kind if turned else suffix[kind] for kind, turned in zip(_by_type(values, default), rotary, strict=False)]


_LLAMA = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA = {
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "layer_types": None, "hidden_act": None,
}  # fmt: skip
_GEMMA_OPTIONS = {"norm_offset": 1.0, "post_norm": True, "embedding_scale": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_LLAMA, "attention_bias": False, "mlp_bias": False},
        _always_global,
        with_scaled_queries="ministral3",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
        _all_alike,
        with_scaled_queries="ministral3",
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {**_LLAMA, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None},
        _all_alike,
        scales_queries=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {**_LLAMA, **_WINDOWED, "num_key_value_heads": 32}, _qwen, options={"qkv_bias": True}
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_LLAMA, **_WINDOWED, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
        _qwen,
        names={**LLAMA_NAMES, **_QK_NORMS},
        options={"qk_norm": "head"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _gemma2,
        names=_GEMMA_NAMES,
        options=_GEMMA_OPTIONS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window_pattern": None,
            "_sliding_window_pattern": None,
        },
        _gemma3,
        names={**_GEMMA_NAMES, **_QK_NORMS},
        options={**_GEMMA_OPTIONS, "qk_norm": "head"},
        nested=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM", {**_LLAMA, "rms_norm_eps": 1e-5, "sliding_window": None}, _all_alike, names=_PHI3_NAMES
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**_LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False},
        _always_global,
        names={**LLAMA_NAMES, **_POST_NORMS, **_QK_NORMS},
        options={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
            "layer_types": None, "attention_bias": False, "mlp_bias": False, "no_rope_layers": None, "no_rope_layer_interval": 4,
        },
        _smollm3,
        theta=2e6,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **_LLAMA, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        _all_alike,
        names=_MIXTRAL_NAMES,
        theta=1e6,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_LLAMA, **_WINDOWED, "num_key_value_heads": 4, "attention_bias": False, "num_local_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
        },
        _all_alike_if_used,
        names=_QWEN3_MOE_NAMES,
        options={"qk_norm": "head"},
        fields={"mlp_dim": "moe_intermediate_size"},
        aliases={"num_experts": "num_local_experts"},
    ),
}  # fmt: skip
"""Hugging Face's `model_type` -> family."""
