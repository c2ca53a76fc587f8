"""The peers: transformers' Llama in full or under peft's LoRA, with fused AdamW. Needs neither lcx nor jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from side import OPTIMIZER, batches, cores, serve
from torch_side import adamw, llama_config


def build(
    sizes: dict[str, int], theta: float, length: int, rank: int | None, alpha: float, dtype: str, checkpointing: bool
) -> tuple[Callable[[], float], dict[str, Any]]:
    """An eager step on all cores, float32 or under autocast to bfloat16; without a rank all parameters are trained."""
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    config = llama_config(sizes, length, theta)
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).train()
    if rank is not None:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model)
    host = batches(1, length)

    def run() -> float:
        tokens = torch.from_numpy(next(host)).long()
        optimizer.zero_grad(set_to_none=True)
        labels = {"labels": tokens[:, :-1], "shift_labels": tokens[:, 1:].contiguous()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens[:, :-1], **labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER["clip_norm"], foreach=True)
        optimizer.step()
        return loss.item()

    parameters = sum(p.numel() for p in model.parameters())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return run, {"parameters": parameters, "trained": sum(p.numel() for p in trained), "versions": versions}


if __name__ == "__main__":
    serve(build, warm=0)
