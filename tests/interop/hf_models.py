"""Small random models made, saved and run by transformers: what lcx's reading and writing is compared with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lcx.core.batch import Batch
from lcx.interop.folder import HfFolder
from lcx.model.architecture import build_architecture
from lcx.model.execution import ExecutionConfig
from lcx.model.loss import logits
from lcx.model.transformer import hidden_states

TRAINED = 64
"""Length that the small models say they were trained for."""

SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=TRAINED, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "mistral": dict(sliding_window=24),
    "qwen2": dict(use_sliding_window=True, sliding_window=24, max_window_layers=2),
    "qwen3": dict(head_dim=24),
    "gemma2": dict(head_dim=24, sliding_window=24, query_pre_attn_scalar=20),
    "gemma3_text": dict(head_dim=24, sliding_window=24, query_pre_attn_scalar=20, num_hidden_layers=7),
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2, head_dim=24),
    "qwen3_moe": dict(num_experts=5, moe_intermediate_size=40, num_experts_per_tok=3, norm_topk_prob=True),
    "phi3": dict(original_max_position_embeddings=TRAINED),
}
"""What a family has beside `SMALL`, chosen so that no default can hide a key that is not read."""

transformers.utils.logging.disable_progress_bar()


def make(model_type: str, folder: Path, shard: str = "1GB", **changes: Any) -> transformers.PreTrainedModel:
    """A random float32 model of a family, saved in `folder` as transformers saves it."""
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **OWN.get(model_type, {}), **changes})
    generator = torch.Generator().manual_seed(0)
    with float64_rotary():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            flat = parameter.ndim == 1
            centre = 1.0 if flat and "norm" in name and "gemma" not in model_type else 0.0
            parameter.copy_(centre + noise * (0.2 if flat else parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@contextlib.contextmanager
def float64_rotary() -> Iterator[None]:
    """transformers computes rotary angles in float64 where it asks for `torch.float`: its own are off by 4e-4 at 8K."""
    single, cast = torch.float, torch.Tensor.float
    torch.float, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float, torch.Tensor.float = single, cast


def tokens(length: int, rows: int = 2, vocab: int = 256, seed: int = 0) -> np.ndarray:
    """int32 `[rows, length]`, no row like another."""
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def torch_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 `[B, T, V]` with exact angles."""
    with torch.no_grad(), float64_rotary():
        return model(torch.tensor(ids).long()).logits.float().numpy().astype(np.float32)


def batch(ids: np.ndarray) -> Batch:
    """Rows without padding, each token's target the next one; the last has no weight."""
    B, T = ids.shape
    order = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    weights = jnp.ones((B, T), jnp.float32).at[:, -1].set(0)
    targets = np.roll(ids, -1, axis=1)
    return Batch(
        tokens=jnp.asarray(ids), targets=jnp.asarray(targets), loss_weights=weights, order=order, positions=order,
        segments=jnp.ones((B, T), jnp.int32),
    )  # fmt: skip


def lcx_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """float32 `[B, T, V]` of the model in a folder, laid out for the rows' length."""
    source = HfFolder(folder)
    arch, buffers = build_architecture(source.described.model, ExecutionConfig(), source.described.schemes, ids.shape[1])
    params = source.params("float32")
    return np.asarray(logits(params, hidden_states(params, buffers, arch, batch(ids))[0], arch.config))
