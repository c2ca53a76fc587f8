"""Published model families as presets: sizes and options from their `config.json` files, positions per layer kind.

A preset is a starting point: `shrink` keeps a family's options at sizes that fit a laptop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lcx.core.configs import choice
from lcx.model.config import ModelConfig
from lcx.model.execution import ExecutionConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A model, the positional scheme of each of its layer kinds (see `model.architecture.build_schemes`), and how to compute it."""

    model: ModelConfig
    positions: dict[str, Any]
    trained_length: int
    execution: ExecutionConfig = ExecutionConfig(compute_dtype="bfloat16", remat="block")


def _llama(**changes: Any) -> ModelConfig:
    sizes = dict(vocab_size=128256, model_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336)
    return ModelConfig(**{**sizes, "norm_eps": 1e-5, **changes})


def _qwen2() -> ModelConfig:
    sizes = dict(vocab_size=152064, model_dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_dim=18944)
    return _llama(**sizes, qkv_bias=True, norm_eps=1e-6)


def _gemma(**changes: Any) -> ModelConfig:
    shared = dict(head_dim=256, activation="gelu_tanh", norm_offset=1.0, norm_eps=1e-6, post_norm=True, query_scale=256**-0.5)
    return _llama(**shared, tied_embeddings=True, embedding_scale=True, **changes)


def _gemma2() -> ModelConfig:
    sizes = dict(vocab_size=256000, model_dim=3584, num_layers=42, num_heads=16, num_kv_heads=8, mlp_dim=14336)
    return _gemma(**sizes, attention_softcap=50.0, logit_softcap=30.0, pattern=("local", "global"), window=4096)


def _gemma3() -> ModelConfig:
    sizes = dict(vocab_size=262208, model_dim=2560, num_layers=34, num_heads=8, num_kv_heads=4, mlp_dim=10240)
    return _gemma(**sizes, qk_norm="head", pattern=("local",) * 5 + ("global",), window=1024)


def _olmo2() -> ModelConfig:
    sizes = dict(vocab_size=100352, num_kv_heads=32, mlp_dim=11008)
    return _llama(**sizes, norm_eps=1e-6, pre_norm=False, post_norm=True, qk_norm="full")


def _smollm3() -> ModelConfig:
    sizes = dict(model_dim=2048, num_layers=36, num_heads=16, num_kv_heads=4, mlp_dim=11008)
    return _llama(**sizes, norm_eps=1e-6, tied_embeddings=True, pattern=("global",) * 3 + ("nope",))


def _mixtral() -> ModelConfig:
    return _llama(vocab_size=32000, num_experts=8, experts_per_token=2, router_aux_weight=0.02)


def _qwen3_moe() -> ModelConfig:
    sizes = dict(
        vocab_size=151936, model_dim=2048, num_layers=48, num_kv_heads=4, mlp_dim=768, num_experts=128, experts_per_token=8
    )
    return _llama(**sizes, norm_eps=1e-6, qk_norm="head", router_aux_weight=1e-3)


_LLAMA31 = {"name": "llama3", "theta": 5e5, "factor": 8.0, "original_length": 8192}

FAMILIES: dict[str, Family] = {
    "llama2_7b": Family(_llama(vocab_size=32000, num_kv_heads=32, mlp_dim=11008), {"default": "rope:theta=10000"}, 4096),
    "llama3_8b": Family(_llama(), {"default": "rope:theta=500000"}, 8192),
    "llama31_8b": Family(_llama(), {"default": _LLAMA31}, 131072),
    "mistral_7b": Family(_llama(vocab_size=32000, pattern=("local",), window=4096), {"default": "rope:theta=10000"}, 8192),
    "mixtral_8x7b": Family(_mixtral(), {"default": "rope:theta=1000000"}, 32768),
    "qwen2_7b": Family(_qwen2(), {"default": "rope:theta=1000000"}, 32768),
    "qwen25_7b": Family(_qwen2(), {"default": "rope:theta=1000000"}, 32768),
    "qwen3_8b": Family(
        _llama(vocab_size=151936, num_layers=36, mlp_dim=12288, norm_eps=1e-6, qk_norm="head"),
        {"default": "rope:theta=1000000"},
        40960,
    ),
    "qwen3_30b_a3b": Family(_qwen3_moe(), {"default": "rope:theta=1000000"}, 40960),
    "gemma2_9b": Family(_gemma2(), {"default": "rope:theta=10000"}, 8192),
    "gemma3_4b": Family(_gemma3(), {"local": "rope:theta=10000", "global": "linear:theta=1000000,factor=8"}, 131072),
    "phi3_mini_4k": Family(
        _llama(vocab_size=32064, model_dim=3072, num_kv_heads=32, head_dim=96, mlp_dim=8192, pattern=("local",), window=2047),
        {"default": "rope:theta=10000"},
        4096,
    ),
    "olmo2_7b": Family(_olmo2(), {"default": "rope:theta=500000"}, 4096),
    "smollm3_3b": Family(_smollm3(), {"default": "rope:theta=5000000", "nope": "nope"}, 65536),
}


def family(name: str) -> Family:
    """The preset of this name; raises `UserError` naming the nearest if there is none."""
    return FAMILIES[choice("family", name, FAMILIES)]


def shrink(config: ModelConfig, **sizes: Any) -> ModelConfig:
    """The same options at laptop sizes: two key-value groups if the family groups its heads, two of four experts if any."""
    kv_heads = 4 if config.num_kv_heads == config.num_heads else 2
    small: dict[str, Any] = dict(
        vocab_size=256, model_dim=64, num_layers=len(config.pattern) + 1, num_heads=4, num_kv_heads=kv_heads, head_dim=16
    )
    small |= dict(mlp_dim=128, window=None if config.window is None else 8)
    if config.num_experts is not None:
        small |= dict(num_experts=4, experts_per_token=2)
    if config.query_scale is not None:
        small["query_scale"] = 16**-0.5
    return dataclasses.replace(config, **{**small, **sizes})
