"""The peer: transformers' LlamaForCausalLM with torch's fused attention and fused AdamW. Needs neither lcx nor jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from side import MODEL, NORM_EPS, OPTIMIZER, THETA, batches, cores, serve


def build(rows: int, length: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """An eager float32 step on all cores: forward, backward, clipping, AdamW."""
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(MODEL, length, THETA)).train()
    optimizer = adamw(model)
    host = batches(rows, length)

    def run() -> float:
        tokens = torch.from_numpy(next(host)).long()
        optimizer.zero_grad(set_to_none=True)
        # transformers shifts labels itself; shift_labels skips that and makes it T predictions a row, as on the other side.
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_norm"], foreach=True)
        optimizer.step()
        return loss.item()

    parameters = sum(p.numel() for p in model.parameters())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return run, {"parameters": parameters, "versions": versions, "threads": torch.get_num_threads()}


def llama_config(sizes: dict[str, int], length: int, theta: float) -> transformers.LlamaConfig:
    """Shared sizes in transformers' words."""
    return transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["model_dim"],
        intermediate_size=sizes["mlp_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=length,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype="float32",
    )


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices only, as the other side does."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (OPTIMIZER["b1"], OPTIMIZER["b2"])
    return torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], betas=betas, eps=OPTIMIZER["eps"], fused=True)


if __name__ == "__main__":
    serve(build)
